"""How long to wait after a failure before the next try: each pause is twice the one before, up to a longest.

Pure arithmetic, for servers and clients alike. The caller counts the failures in a row and adds jitter if it
wants some.
"""

_MOST_DOUBLINGS = 60
"""Beyond it every pause is the longest; a float would overflow at 1,024."""


def back_off_s(failures: int, first_s: float, longest_s: float) -> float:
    """Return the seconds to wait after so many failures in a row: 1 gives first_s; none gives 0."""
    if failures < 1:
        return 0.0
    return min(longest_s, first_s * 2.0 ** min(failures - 1, _MOST_DOUBLINGS))
