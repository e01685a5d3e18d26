"""Text that the page takes for text."""


def cell(text: str) -> str:
    """Text that cannot leave its table cell or code span."""
    return " ".join(text.replace("|", "/").replace("`", "'").split())
