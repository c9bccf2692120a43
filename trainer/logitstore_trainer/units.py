"""Bytes and seconds in the words that lines for people use."""


def bytes_text(n_bytes: float) -> str:
    """ "812 B", "24.3 MB", "1.2 TB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"


def duration_text(seconds: float) -> str:
    """ "85 s", "12 min", "3.5 h"."""
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes:.0f} min" if minutes < 120 else f"{hours:.1f} h"
