"""Forecasters the predictive rules name: last value, Kalman filter, autoregression.

    constant   y(t+1) = y(t)
    Kalman     level and trend, both random walks (local linear trend), observed with noise
    ARIMA      the series is differenced until it is level (KPSS test), then
               y(t) = m + sum phi_i (y(t-i) - m) + e

The ARIMA here has no moving-average terms and no seasons: order (p, d, 0), p by the corrected Akaike
criterion, coefficients by Yule-Walker (Levinson-Durbin recursion), so that a forecast of many steps can never
explode. The peers use pmdarima's `auto_arima` (max p 5, d by KPSS at 5 %, q up to 5) or prepared files;
a moving average that can be inverted is a long autoregression, so what is lost is thrift in parameters, and
what is saved is a dependency that has to be compiled.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

KPSS_5_PERCENT = 0.463
"""Critical value of the level-stationarity statistic (Kwiatkowski et al. 1992, table 1)."""

Series = NDArray[np.float64]


class Forecaster(Protocol):
    """One series, one step ahead."""

    def add(self, value: float) -> None:
        """Note the newest value; what is not finite counts as 0."""
        ...

    def next(self) -> float:
        """Return the value expected for the next step: finite, at least 0; asking twice changes nothing."""
        ...


def clean(value: float) -> float:
    """Return the value, or 0 for what is no finite number (an average over no requests is NaN)."""
    return value if math.isfinite(value) else 0.0


class Constant:
    """As it was, so it will be."""

    def __init__(self) -> None:
        """Begin with nothing seen."""
        self._last = 0.0

    def add(self, value: float) -> None:
        """Note the newest value."""
        self._last = max(0.0, clean(value))

    def next(self) -> float:
        """Return the last value, 0 before there is one."""
        return self._last


class Kalman:
    """Local linear trend: level' = level + trend + w, trend' = trend + u, seen = level + v.

    q_level, q_trend, r: variances of w, u, v in the units of the series squared; the defaults and the large
    first covariance are Dynamo's (planner defaults, 2026-08). Zeros before the first traffic are skipped.
    """

    FIRST_VARIANCE = 1000.0

    def __init__(self, q_level: float = 1.0, q_trend: float = 0.1, r: float = 10.0) -> None:
        """Begin with nothing seen."""
        self._noise = (q_level, q_trend, r)
        self._level = self._trend = 0.0
        self._p = (self.FIRST_VARIANCE, 0.0, self.FIRST_VARIANCE)  # var level, cov, var trend
        self._began = False

    def add(self, value: float) -> None:
        """Step the filter by one interval and correct it by what was seen."""
        value = clean(value)
        if not self._began:
            if value != 0.0:
                self._began, self._level = True, value
            return
        q_level, q_trend, r = self._noise
        level, trend = self._level + self._trend, self._trend
        a, b, c = self._p
        a, b, c = a + 2.0 * b + c + q_level, b + c, c + q_trend
        gain_level, gain_trend = a / (a + r), b / (a + r)
        off = value - level
        self._level, self._trend = level + gain_level * off, trend + gain_trend * off
        self._p = ((1.0 - gain_level) * a, (1.0 - gain_level) * b, c - gain_trend * b)

    def next(self) -> float:
        """Return level plus trend; a falling trend does not go below 0."""
        return max(0.0, self._level + self._trend)


@dataclass(frozen=True)
class AutoRegression:
    """A fitted ARIMA(p, d, 0). mean: of the differenced series; last: newest values of each difference."""

    d: int
    mean: float
    phi: tuple[float, ...]
    recent: tuple[float, ...]
    """The last max(p, 1) values of the d times differenced series, oldest first."""
    ends: tuple[float, ...]
    """The last value of the series differenced 0, 1 .. d-1 times: what a forecast is summed up from."""

    def path(self, steps: int) -> list[float]:
        """Return the next so many values, in the units of the series."""
        past = list(self.recent)
        ends = list(self.ends)
        found: list[float] = []
        for _ in range(steps):
            value = self.mean + sum(
                p * (past[-1 - i] - self.mean) for i, p in enumerate(self.phi) if i < len(past)
            )
            past.append(value)
            for level in reversed(range(self.d)):
                ends[level] += value
                value = ends[level]
            found.append(value)
        return found


def kpss(y: Series) -> float:
    """Return the level-stationarity statistic, Newey-West over 3 sqrt(n)/13 lags; 0 for a constant."""
    n = len(y)
    e = y - y.mean()
    lags = int(3.0 * math.sqrt(n) / 13.0)
    variance = float(e @ e) / n
    for lag in range(1, lags + 1):
        variance += 2.0 / n * (1.0 - lag / (lags + 1.0)) * float(e[lag:] @ e[:-lag])
    if variance <= 1e-12:
        return 0.0
    sums = np.cumsum(e)
    return float(sums @ sums) / (n * n * variance)


def fit(values: Sequence[float], max_p: int = 5, max_d: int = 2) -> AutoRegression:
    """Choose d and p and fit; values: oldest first, at least one.

    A difference has no mean of its own here: a drift over a forecast of an hour would be a guess.
    """
    y: Series = np.asarray(values, dtype=np.float64)
    d, ends = 0, []
    while d < max_d and len(y) > 3 and kpss(y) > KPSS_5_PERCENT:
        ends.append(float(y[-1]))
        y = np.diff(y)
        d += 1
    mean = float(y.mean()) if d == 0 else 0.0
    phi = yule_walker(y - mean, max_p)
    recent = tuple(float(v) for v in y[-max(len(phi), 1) :])
    return AutoRegression(d, mean, phi, recent, tuple(ends))


def yule_walker(e: Series, max_p: int) -> tuple[float, ...]:
    """Return coefficients of the order with the best corrected Akaike criterion; () is white noise."""
    n = len(e)
    c0 = float(e @ e) / n
    if c0 <= 1e-12:
        return ()
    phi: list[float] = []
    best: tuple[float, ...] = ()
    best_score = n * math.log(c0) + criterion(0, n)
    variance = c0
    c: list[float] = []  # autocovariances at lag 1, 2, ...
    for p in range(1, min(max_p, (n - 3) // 2) + 1):
        c.append(float(e[p:] @ e[: n - p]) / n)
        kappa = (c[p - 1] - sum(phi[i] * c[p - 2 - i] for i in range(p - 1))) / variance
        phi = [phi[i] - kappa * phi[p - 2 - i] for i in range(p - 1)] + [kappa]
        variance *= 1.0 - kappa * kappa
        if variance <= 1e-12 * c0:
            return tuple(phi)
        score = n * math.log(variance) + criterion(p, n)
        if score < best_score:
            best, best_score = tuple(phi), score
    return best


def criterion(p: int, n: int) -> float:
    """Return what an order costs: two a parameter (p, mean, variance), more with few values."""
    k = p + 2
    return 2.0 * k + (2.0 * k * (k + 1) / (n - k - 1) if n > k + 1 else math.inf)


class Arima:
    """One step ahead by `fit`; the last value until there are five.

    When the best order says nothing beyond the differences (p = 0) the fit is done on log(1 + y), as Dynamo's
    does for spiky series.
    """

    FEWEST = 5

    def __init__(self) -> None:
        """Begin with nothing seen."""
        self._values: list[float] = []
        self._next: float | None = None

    def add(self, value: float) -> None:
        """Note the newest value; zeros before the first traffic are skipped."""
        value = max(0.0, clean(value))
        if value == 0.0 and not self._values:
            return
        self._values.append(value)
        self._next = None

    def next(self) -> float:
        """Return the forecast; computed once a value."""
        if self._next is None:
            self._next = max(0.0, clean(self._forecast()))
        return self._next

    def _forecast(self) -> float:
        if len(self._values) < self.FEWEST or len(set(self._values)) == 1:
            return self._values[-1] if self._values else 0.0
        model = fit(self._values)
        if model.phi:
            return model.path(1)[0]
        return math.expm1(min(fit([math.log1p(v) for v in self._values]).path(1)[0], 700.0))
