"""What a message says itself: where its complaint ends, and what to do begins."""

import re

_START = re.compile(
    r"""
    (?:(?<=:[ ])|(?<=;[ ])|(?<=\.[ ])|(?<=,[ ]so[ ])|(?<=,[ ])(?=expected|leave|set\b|keep|lower))
    (?:adapt|add|allow|ask|attach|bring|build|call|cast|change|check|choose|convert|copy|correct|cut
    |download|end|export|fuse|gather|get|give|go|install|keep|leave|let|load|look|lower|make|mend
    |merge|pad|pass|pick|put|raise|rebuild|remove|rename|resize|restart|resume|return|roll|run|save
    |set|shorten|size|start|stop|sweep|take|train|turn|unset|use|wait|write
    |then|either|prefer|expected|name[ ]the|(?:it[ ])?must[ ]be|must[ ]have|where[ ]that[ ]is)\b
    """,
    re.IGNORECASE | re.VERBOSE,
)
LABEL = re.compile(r"^(?:WARNING|warning|error|megalora|> LoRA): ")


def split(message: str) -> tuple[str, str] | None:
    """Return the complaint of a message and what to do, None where it does not say that.

    What braces hold is a placeholder, in which nothing begins.
    """
    hidden = re.sub(r"\{[^{}]*\}", lambda match: "_" * len(match[0]), message)
    start = _START.search(hidden)
    if start is None:
        return None
    complaint = LABEL.sub("", message[: start.start()]).rstrip(" :;,.")
    return complaint.removesuffix(", so"), message[start.start() :]
