import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.time.Duration;
import java.util.ArrayList;
import java.util.Iterator;
import java.util.List;
import java.util.concurrent.Callable;
import java.util.concurrent.CompletableFuture;

/** JDK's HttpClient with its defaults, which offer HTTP/2: prints one JSON object, as programs.py does. */
public class Chat {
    static final HttpClient CLIENT = HttpClient.newHttpClient();
    static String base;

    static HttpRequest ask(String text, String more) {
        String body = "{\"model\": \"vllm-13\", \"messages\": [{\"role\": \"user\", \"content\": \"" + text + "\"}]" + more + "}";
        return HttpRequest.newBuilder(URI.create(base + "/chat/completions"))
            .header("Content-Type", "application/json").timeout(Duration.ofSeconds(120))
            .POST(HttpRequest.BodyPublishers.ofString(body)).build();
    }

    static String whole(HttpRequest request) throws Exception {
        HttpResponse<String> answer = CLIENT.send(request, HttpResponse.BodyHandlers.ofString());
        if (answer.statusCode() != 200) throw new Exception("status " + answer.statusCode());
        return answer.body();
    }

    static void has(String text, String wanted) throws Exception {
        if (!text.contains(wanted)) throw new Exception("no " + wanted.replace("\"", ""));
    }

    static final List<String> FOUND = new ArrayList<>();

    static void check(String name, Callable<Void> call) {
        String wrong = "";
        try {
            call.call();
        } catch (Exception e) {
            wrong = e.toString().replace("\"", "'").replace("\\", "");
        }
        FOUND.add("\"" + name + "\": \"" + wrong + "\"");
    }

    static final String TOOL = ", \"tools\": [{\"type\": \"function\", \"function\": {\"name\": \"weather\", \"parameters\": "
        + "{\"type\": \"object\", \"properties\": {\"city\": {\"type\": \"string\"}}, \"required\": [\"city\"]}}}]";

    public static void main(String[] words) throws Exception {
        base = words[0];
        check("chat", () -> { has(whole(ask("Hello", ", \"max_tokens\": 8")), "\"content\""); return null; });
        check("stream", () -> { has(whole(ask("Hello", ", \"max_tokens\": 8, \"stream\": true")), "data: [DONE]"); return null; });
        check("tools", () -> { has(whole(ask("Hello", TOOL)), "\"tool_calls\""); return null; });
        check("cancel", () -> {
            var answer = CLIENT.send(ask("Count to 168.", ", \"stream\": true"), HttpResponse.BodyHandlers.ofLines());
            Iterator<String> lines = answer.body().iterator();
            lines.next();
            answer.body().close();
            has(whole(ask("Hello", ", \"max_tokens\": 8")), "\"content\"");
            return null;
        });
        check("timeout", () -> {
            HttpRequest late = HttpRequest.newBuilder(ask("Count to 168.", ""), (n, v) -> true).timeout(Duration.ofMillis(500)).build();
            try {
                whole(late);
            } catch (java.net.http.HttpTimeoutException e) {
                return null;
            }
            throw new Exception("it waited for the whole answer");
        });
        check("16 at once", () -> {
            List<CompletableFuture<HttpResponse<String>>> all = new ArrayList<>();
            for (int n = 0; n < 16; n++) all.add(CLIENT.sendAsync(ask("Hello", ", \"max_tokens\": 8"), HttpResponse.BodyHandlers.ofString()));
            for (var one : all) if (one.join().statusCode() != 200) throw new Exception("status " + one.join().statusCode());
            return null;
        });
        System.out.println("{" + String.join(", ", FOUND) + "}");
        System.exit(0);
    }
}
