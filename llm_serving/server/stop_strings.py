"""Where does a text stop?  Stop strings, found in a stream of pieces cut anywhere.

The one that is complete first ends the text; of several that end with the same character, the
longest.  So the answer does not depend on how the text was cut into pieces.  Neither the stop
string nor anything after it comes out, and what may still become one is held back: the longest
end of the text that some stop string starts with.

Each stop string is matched by Knuth, Morris and Pratt's automaton (SIAM J. Comput. 6, 1977), O(1)
amortised a character; its failure table grows only as far as the text has ever matched.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["StopStrings"]


class StopStrings:
    def __init__(self, stops: Sequence[str] = ()) -> None:
        """`stops` are not empty."""
        self._needles = [_Needle(stop) for stop in stops]
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Add a piece; what may go out.  Once a stop string is found, nothing does any more."""
        if self.found is not None:
            return ""
        if not self._needles or not text:
            return text
        matches = [(end, needle) for needle in self._needles if (end := needle.advance(text)) >= 0]
        text = self._held + text
        if matches:
            return self._cut(text, matches)
        num_out = len(text) - max(needle.num_matched for needle in self._needles)
        self._held = text[num_out:]
        return text[:num_out]

    def flush(self) -> str:
        """What was held back: the text has ended here."""
        held, self._held = self._held, ""
        return held

    def is_holding(self) -> bool:
        return self._held != ""

    def _cut(self, text: str, matches: list[tuple[int, _Needle]]) -> str:
        end, needle = min(matches, key=lambda match: (match[0], -len(match[1].stop)))
        end += len(self._held)
        self.found, self._held = needle.stop, ""
        return text[: end - len(needle.stop)]


class _Needle:
    __slots__ = ("_failure", "num_matched", "stop")

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.num_matched = 0  # the longest end of the text that `stop` starts with
        # [n] for n matched characters: the next shorter end of theirs that `stop` starts with
        self._failure = [0, 0]

    def advance(self, text: str) -> int:
        """Go on with `text`; where in it (exclusive) the stop string is complete, or -1."""
        stop, failure, matched = self.stop, self._failure, self.num_matched
        at = 0
        while at < len(text):
            if not matched and (at := text.find(stop[0], at)) < 0:
                break
            while matched and text[at] != stop[matched]:
                matched = failure[matched]
            if text[at] == stop[matched]:
                matched += 1
                if matched == len(stop):
                    return at + 1
                if matched == len(failure):
                    self._extend()
            at += 1
        self.num_matched = matched
        return -1

    def _extend(self) -> None:
        """The failure of one character more."""
        stop, failure = self.stop, self._failure
        num = len(failure)
        shorter = failure[num - 1]
        while shorter and stop[shorter] != stop[num - 1]:
            shorter = failure[shorter]
        failure.append(shorter + (stop[shorter] == stop[num - 1]))
