"""Lines that stay and a picture below them that is drawn again, on a terminal; a log elsewhere."""

import shutil
import sys


class Screen:
    """On a terminal the picture moves along below the lines; in a file it's printed at the end."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._picture: list[str] = []
        self._drawn = 0

    def line(self, text: str) -> None:
        """A line that stays."""
        self._wipe()
        print(text)
        self._draw()

    def show(self, picture: list[str]) -> None:
        """Put a picture in the place of the last one."""
        self._wipe()
        self._picture = picture
        self._draw()

    def end(self) -> None:
        """Let the last picture stay."""
        if not self._terminal:
            print("\n".join(self._picture))
        self._picture, self._drawn = [], 0
        sys.stdout.flush()

    def _wipe(self) -> None:
        if self._terminal and self._drawn:
            print(f"\x1b[{self._drawn}F\x1b[J", end="")

    def _draw(self) -> None:
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            for text in self._picture:
                print(text[:width])
            self._drawn = len(self._picture)
        sys.stdout.flush()
