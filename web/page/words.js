/* Numbers and times in words. */

const digits = (value, n) => value.toLocaleString("en", { minimumFractionDigits: n, maximumFractionDigits: n });

export const dollars = (usd) =>
  usd == null ? "–" : "$" + digits(usd, usd && Math.abs(usd) < 0.995 ? (Math.abs(usd) < 0.0995 ? 4 : 3) : 2);

export const percent = (share) => (share == null ? "–" : `${digits(share * 100, share > 0.999 && share < 1 ? 2 : 1)} %`);

export const number = (value, n = 0) => (value == null ? "–" : digits(value, n));

/* digitsSmall: of what is less than ten seconds. */
export function span(seconds, digitsSmall = 1) {
  if (seconds == null) return "–";
  if (seconds < 10) return `${digits(Math.max(0, seconds), digitsSmall)} s`;
  if (seconds < 100) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${digits(seconds / 3600, 1)} h`;
  return `${Math.round(seconds / 86400)} days`;
}

/* A time since the start of a run: 1:02:03, or 2:03 within the first hour. */
export function since(seconds) {
  const two = (n) => String(n).padStart(2, "0");
  const all = Math.round(seconds), h = Math.floor(all / 3600), m = Math.floor(all / 60) % 60;
  return h ? `${h}:${two(m)}:${two(all % 60)}` : `${m}:${two(all % 60)}`;
}

export const clock = (epochS) => new Date(epochS * 1000).toLocaleTimeString("en-GB");
export const moment = (epochS) => new Date(epochS * 1000).toLocaleString("en-GB");
