"""To be described."""
def main() -> int:
    return 0
