"""The text of a scrape, byte for byte prometheus-client's own, with labels written but once.

Its encoders spend 13 µs on a series, nearly all on labels, which are the same in every scrape. A
`SteadyGauge` keeps what the library wrote for it, and what gzip made of that; all other families
go through the library.
"""

import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from functools import cached_property, partial
from itertools import groupby
from typing import Self

from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

Encoder = Callable[[Collector], bytes]

_LEVEL = 1  # half of the usual level's CPU, for an answer a tenth larger
_GZIP_BEGIN = bytes.fromhex("1f8b 08 00 00000000 04 ff")  # no name, no time, fastest, any system
_DEFLATE_END = zlib.compressobj(_LEVEL, wbits=-zlib.MAX_WBITS).flush()  # an empty last block


class DuplicateSeriesError(Exception):
    """A collector gave one label set twice; the sentence names the series."""


class Families(Collector):
    """What prometheus-client's encoders take for a registry: these families."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


class SteadyGauge(Metric):
    """A gauge whose label sets stay the same from scrape to scrape; never change its samples."""

    def __init__(
        self, name: str, documentation: str, series: Iterable[tuple[dict[str, str], float]]
    ) -> None:
        """series: labels and value of each; `DuplicateSeriesError` where labels come twice."""
        super().__init__(name, documentation, "gauge")
        self.samples = [Sample(name, labels, value) for labels, value in series]
        seen = set()
        for sample in self.samples:
            labels = tuple(sorted(sample.labels.items()))
            if labels in seen:
                raise DuplicateSeriesError(f"{name}{sample.labels} was given twice")
            seen.add(labels)
        # Kept per format and escaping of names: nothing else changes how a gauge is written.
        self._heads: dict[object, tuple[str, list[str]]] = {}
        self._texts: dict[object, _Text] = {}

    def at(self, values: Iterable[float]) -> Self:
        """The same series, in the same order, with other values."""
        other = copy(self)
        other.samples = [
            Sample(sample.name, sample.labels, value)
            for sample, value in zip(self.samples, values, strict=True)
        ]
        other._texts = {}  # noqa: SLF001 - the same class
        return other

    def text(self, encode: Encoder) -> "_Text":
        """What `encode` writes for this family, without the end of the answer."""
        key = (
            (encode.func, encode.keywords.get("escaping"))
            if isinstance(encode, partial)
            else encode
        )
        if key not in self._texts:
            if key not in self._heads:
                self._heads[key] = self._written(encode)
            comments, heads = self._heads[key]
            lines = [
                f"{head} {floatToGoString(sample.value)}\n"  # type: ignore[no-untyped-call]
                for head, sample in zip(heads, self.samples, strict=True)
            ]
            self._texts[key] = _Text("".join([comments, *lines]).encode())
        return self._texts[key]

    def _written(self, encode: Encoder) -> tuple[str, list[str]]:
        """The library's comment lines, and its lines of the samples up to their values."""
        whole = _without_end(encode, [self]).decode()
        lines = whole.split("\n")  # not splitlines: labels may hold other ends of lines
        first = len(lines) - 1 - len(self.samples)
        comments = "".join(f"{line}\n" for line in lines[:first])
        return comments, [line.rpartition(" ")[0] for line in lines[first:-1]]


class _Text:
    """A part of an answer, deflated at most once."""

    def __init__(self, plain: bytes) -> None:
        self.plain = plain

    @cached_property
    def deflated(self) -> bytes:
        """Whole blocks without the last one's mark, so that others can stand before and after."""
        deflate = zlib.compressobj(_LEVEL, wbits=-zlib.MAX_WBITS)
        return deflate.compress(self.plain) + deflate.flush(zlib.Z_FULL_FLUSH)


def text_of(encode: Encoder, families: Sequence[Metric]) -> bytes:
    """What `encode` writes for the families.

    encode: one of prometheus-client's, as `choose_encoder` gives it.
    """
    return b"".join([part.plain for part in _parts(encode, families)])


def gzip_of(encode: Encoder, families: Sequence[Metric]) -> bytes:
    """The same as one gzip member (RFC 1952); what stayed the same isn't compressed again."""
    parts = _parts(encode, families)
    checksum = size = 0
    for part in parts:
        checksum = zlib.crc32(part.plain, checksum)
        size += len(part.plain)
    end = struct.pack("<II", checksum, size & 0xFFFFFFFF)
    return b"".join([_GZIP_BEGIN, *[part.deflated for part in parts], _DEFLATE_END, end])


def _parts(encode: Encoder, families: Sequence[Metric]) -> list[_Text]:
    parts = []
    for steady, group in groupby(families, lambda family: isinstance(family, SteadyGauge)):
        if steady:
            parts += [family.text(encode) for family in group if isinstance(family, SteadyGauge)]
        else:
            parts.append(_Text(_without_end(encode, group)))
    parts.append(_Text(encode(Families([]))))
    return parts


def _without_end(encode: Encoder, families: Iterable[Metric]) -> bytes:
    return encode(Families(families)).removesuffix(encode(Families([])))
