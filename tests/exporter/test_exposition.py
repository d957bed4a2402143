"""Kept text is the library's own text, byte for byte, whatever the labels and values are."""

import zlib

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder, generate_latest
from prometheus_client.registry import Collector

from exporter.exposition import DuplicateSeriesError, Families, SteadyGauge, gzip_of, text_of

ACCEPTS = (
    "",
    "text/plain;version=0.0.4",
    "text/plain;version=1.0.0;escaping=allow-utf-8",
    "application/openmetrics-text",
    *(
        f"application/openmetrics-text;version={version};escaping={escaping},text/plain;q=0.3"
        for version in ("1.0.0", "2.0.0")
        for escaping in ("allow-utf-8", "underscores", "dots", "values")
    ),
)
HOSTILE = ("", '"', "\\", "\n", "\r\n", "\x85\u2028", 'a"} 1\n# EOF\n', "# EOF\n", "x 0.0", "é\0")
TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(HOSTILE)
LABELS = st.dictionaries(st.sampled_from(["node", "path", "_x", "a.b", "ü", "a"]), TEXT)
SERIES = st.lists(
    st.tuples(LABELS, st.floats() | st.integers(-(2**60), 2**60)),
    unique_by=lambda one: tuple(sorted(one[0].items())),
    max_size=5,
)
NAMES = st.sampled_from(["upkeep_days", "a:b", "with.dot", "grüße", "x_created", "upkeep_gsum"])


def _plain(family: Metric) -> Metric:
    plain = Metric(family.name, family.documentation, family.type)
    plain.samples = list(family.samples)
    return plain


@settings(deadline=None)
@given(NAMES, TEXT, SERIES, st.lists(st.floats(), min_size=5, max_size=5))
@example("d", "", [({}, float("nan")), ({"a": "\n"}, float("-inf"))], [1.0, 1e6])
@example(
    "d", "# EOF\n", [({"a": "b"}, -1e300), ({"a": "c"}, 1234567.0), ({}, 5e-324)], [0.0, -0.0, 1e22]
)
def test_the_bytes_are_the_library_s(
    name: str,
    documentation: str,
    series: list[tuple[dict[str, str], float]],
    others: list[float],
) -> None:
    steady = SteadyGauge(name, documentation, series)
    before = GaugeMetricFamily("before", documentation, value=1)
    after = CounterMetricFamily("after", documentation, value=2)
    values = others[: len(series)]
    for accept in ACCEPTS:
        encode, _ = choose_encoder(accept)
        for one in (steady, steady.at(values), steady):  # each after another's text was kept
            families = [before, one, after, one, one]
            plain = Families([before, _plain(one), after, _plain(one), _plain(one)])
            assert text_of(encode, families) == encode(plain), accept
            unpacking = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)  # one member, nothing after
            assert unpacking.decompress(gzip_of(encode, families)) == encode(plain), accept
            assert (unpacking.eof, unpacking.unused_data) == (True, b"")


def test_what_is_steady_is_not_compressed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    compressobj = zlib.compressobj

    def counted(level: int, wbits: int) -> object:
        made.append(level)
        return compressobj(level, wbits=wbits)

    steady = SteadyGauge("x", "An x.", [({"a": "b"}, 1)])
    gzip_of(generate_latest, [steady])
    monkeypatch.setattr(zlib, "compressobj", counted)
    gzip_of(generate_latest, [steady])
    assert len(made) == 1, "the end alone"
    gzip_of(generate_latest, [steady.at([2])])
    assert len(made) == 3


def test_what_is_steady_is_not_written_again() -> None:
    written: list[str] = []

    def encode(registry: Collector) -> bytes:
        families = list(registry.collect())
        written.extend(family.name for family in families)
        return generate_latest(Families(families))

    steady = SteadyGauge("x", "An x.", [({"a": "b"}, 1)])
    texts = [text_of(encode, [steady.at([value]), steady]) for value in (2.5, 3.5)]
    assert [text.count(b"2.5") + text.count(b"3.5") * 2 for text in texts] == [1, 2]
    assert written == ["x"]


def test_a_label_set_given_twice_is_refused() -> None:
    with pytest.raises(DuplicateSeriesError, match=r"upkeep_x.*twice"):
        SteadyGauge("upkeep_x", "", [({"a": "1", "b": ""}, 1), ({"b": "", "a": "1"}, 2)])


def test_values_that_are_too_few_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        SteadyGauge("upkeep_x", "", [({"a": "1"}, 1), ({"a": "2"}, 2)]).at([1])
