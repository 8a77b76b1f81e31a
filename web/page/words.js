/* Numbers and times in words. */

const digits = (value, n) => value.toLocaleString("en", { minimumFractionDigits: n, maximumFractionDigits: n });

export const dollars = (usd) =>
  usd == null ? "–" : "$" + digits(usd, usd && Math.abs(usd) < 0.995 ? (Math.abs(usd) < 0.0995 ? 4 : 3) : 2);

export const percent = (share) => (share == null ? "–" : `${digits(share * 100, share > 0.999 && share < 1 ? 2 : 1)} %`);

export const number = (value, n = 0) => (value == null ? "–" : digits(value, n));

export function span(seconds) {
  if (seconds == null) return "–";
  if (seconds < 10) return `${digits(Math.max(0, seconds), 1)} s`;
  if (seconds < 100) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${digits(seconds / 3600, 1)} h`;
  return `${Math.round(seconds / 86400)} days`;
}

export const clock = (epochS) => new Date(epochS * 1000).toLocaleTimeString("en-GB");
export const moment = (epochS) => new Date(epochS * 1000).toLocaleString("en-GB");
