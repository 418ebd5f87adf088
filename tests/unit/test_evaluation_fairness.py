"""Mean IoU by group: the join of a table to records, by hand, and its intervals."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from rich.console import Console

from sam_jax.errors import ConfigError
from sam_jax.evaluation.comparison.attributes import (
    join_attributes,
    keeps_crowds,
    path_ends,
    read_attributes,
)
from sam_jax.evaluation.comparison.fairness import mean_iou_by_group
from tests.unit.results_fixtures import record


@pytest.fixture
def write(tmp_path):
    def write(text, attributes=()):
        path = tmp_path / "groups.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_attributes(path, attributes)

    return write


RECORDS = [
    record("people", "/data/images/a.jpg", 0.2, 0.4),
    record("people", "/data/images/b.jpg", 0.6),
    {"dataset": "people", "image": "/data/images/c.jpg", "remarked": {}},
    record("people", "/data/tar.tar::sub/d.jpg", 0.9),
]


def means(table, records=RECORDS, numbers=None, **options):
    joined = join_attributes(table, records, numbers)
    report = mean_iou_by_group(table, joined, num_draws=20, measures=["center_1"], **options)
    return report, {
        attribute: {g.value: g.means.get("center_1") for g in groups}
        for attribute, groups in report.groups.items()
    }


def test_rows_of_images_and_rows_of_masks(write):
    _, by_image = means(write("image,age\na.jpg,young\nb.jpg,older\nd.jpg,young\n"))
    assert by_image == {"age": {"young": pytest.approx(0.5), "older": pytest.approx(0.6)}}
    of_masks = "file_name,mask,age,hair\na.jpg,0,young,red\na.jpg,1,older,\nsub/d.jpg,0,older,red\n"
    report, by_mask = means(write(of_masks))
    assert by_mask == {
        "age": {"young": pytest.approx(0.2), "older": pytest.approx(0.65)},
        "hair": {"red": pytest.approx(0.55)},
    }
    assert (report.num_masks, report.num_without_row) == (3, 1)
    assert report.num_without_value == {"age": 0, "hair": 1}


def test_what_fits_nothing_is_counted(write):
    table = write("image,mask,g\na.jpg,0,x\na.jpg,7,x\nz.jpg,0,x\nc.jpg,0,y\n")
    joined = join_attributes(table, RECORDS)
    assert dict(joined.unmatched.counts) == {
        "rows of an image that is not among the evaluated": 2,
        "rows of a mask that is not among the evaluated": 1,
    }
    assert "line 4: z.jpg" in str(joined.unmatched)
    assert "line 3: a.jpg, 7" in str(joined.unmatched)
    assert joined.num_without_row == 3
    report, found = means(table)
    # A group of the table without an evaluated mask is there, and empty.
    assert found == {"g": {"x": pytest.approx(0.2), "y": None}}
    assert "g y: no evaluated mask" in list(report.remarks())


def test_annotation_ids(write):
    table = write("image,annotation_id,g\na.jpg,71,x\na.jpg,72,y\na.jpg,73,y\n")
    numbers = {"a.jpg": {"71": 1, "72": 0}}
    report, found = means(table, numbers=numbers)
    assert found == {"g": {"x": pytest.approx(0.4), "y": pytest.approx(0.2)}}
    assert report.unmatched.total() == 1
    with pytest.raises(ConfigError, match="do not know annotation ids: name the annotation file"):
        join_attributes(table, RECORDS)


def test_annotation_ids_of_files_whose_names_have_folders(write):
    """A table names the pictures as it likes; which of them is meant the record tells."""
    records = [
        record("d", "/data/images/train/a.jpg", 0.1),
        record("d", "/data/images/val/b.jpg", 0.2),
        record("d", "/data/images/c.jpg", 0.3),
    ]
    numbers = {
        "train/a.jpg": {"1": 0},
        "a.jpg": {"9": 0},
        "val\\b.jpg": {"2": 0},
        "images/c.jpg": {"3": 0},
    }
    table = write("image,annotation_id,g\na.jpg,1,x\nval/b.jpg,2,y\nc.jpg,3,z\n")
    report, found = means(table, records, numbers)
    assert report.unmatched.total() == 0
    expected = {"x": pytest.approx(0.1), "y": pytest.approx(0.2), "z": pytest.approx(0.3)}
    assert found == {"g": expected}


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (None, False),
        ([{"kind": "coco", "crowd": None}], False),
        ([{"kind": "coco", "crowd": "keep", "path": "/there/val.json"}], True),
        # Others have no crowds.
        ([{"kind": "coco", "crowd": "keep"}, {"kind": "sa1b", "crowd": None}], True),
        ([{"kind": "joined", "parts": [{"kind": "coco", "crowd": "keep"}]}], True),
        # The name of the file tells which source is meant.
        (
            [
                {"kind": "coco", "crowd": "keep", "path": "/there/val.json"},
                {"kind": "coco", "crowd": None, "path": "/there/other.json"},
            ],
            True,
        ),
    ],
)
def test_whether_crowds_have_numbers_follows_from_the_settings(sources, expected):
    assert keeps_crowds({"sources": sources} if sources else {}, Path("/d/val.json")) is expected


def test_sources_that_differ_in_crowds_are_refused():
    sources = [{"kind": "coco", "crowd": crowd, "path": "x.json"} for crowd in ("keep", None)]
    with pytest.raises(ConfigError, match=r"val\.json: .* differ in it: keep and skip"):
        keeps_crowds({"sources": sources}, Path("/d/val.json"))


def test_equal_names_of_images_need_more_to_tell_them_apart(write):
    records = [record("one", "x/a.jpg", 0.1), record("two", "y/a.jpg", 0.3)]
    with pytest.raises(ConfigError, match=r"a\.jpg may be x/a\.jpg of one or y/a\.jpg of two"):
        join_attributes(write("image,g\na.jpg,v\n"), records)
    for text in ("image,g\ny/a.jpg,v\n", "dataset,image,g\ntwo,a.jpg,v\n", "image,g\ny\\a.jpg,v\n"):
        assert means(write(text), records)[1] == {"g": {"v": pytest.approx(0.3)}}


def test_ends_of_paths():
    assert path_ends("/a/b.jpg") == ["/a/b.jpg", "a/b.jpg", "b.jpg"]
    assert path_ends("t.tar::a/b.jpg") == ["t.tar::a/b.jpg", "t.tar/a/b.jpg", "a/b.jpg", "b.jpg"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("image,g\n", "has a heading and no row"),
        ("name,g\na,b\n", "no column image or file_name or file; its heading is name, g"),
        ("image,mask\na.jpg,0\n", "only columns that say which mask is meant"),
        ("image,g,g\na.jpg,b,c\n", r"twice or empty: \['g'\]"),
        ("image,\na.jpg,b\n", "twice or empty"),
        ("image,g\na.jpg\n", "line 2 has 1 values; its heading has 2"),
        ('image,g\na.jpg,"b\nc"\nb.jpg,b,c\n', "line 4 has 3 values"),
        ("image,g\n,b\n", "line 2: image is empty"),
        ("image,mask,g\na.jpg,first,b\n", "line 2: mask is 'first'; expected a number"),
        ("image,mask,g\na.jpg,-1,b\n", "mask is '-1'"),
        ("image,mask,annotation_id,g\na.jpg,1,1,b\n", "columns mask and annotation_id; keep one"),
        (b"image,g\n\xff\xfe,b\n", "no CSV file in UTF-8"),
        ('image,g\n"a.jpg"x,b\n', "no CSV file in UTF-8"),
    ],
)
def test_tables_that_say_nothing_clear_are_refused(write, text, message):
    with pytest.raises(ConfigError, match=message):
        write(text)


def test_columns_that_are_asked_for_must_be_there(write, tmp_path):
    assert write("image,a,b\nx,1,2\n", ["b"]).attributes == ("b",)
    with pytest.raises(ConfigError, match="no column for the attribute c; there are a, b"):
        write("image,a,b\nx,1,2\n", ["b", "c"])
    with pytest.raises(FileNotFoundError):
        read_attributes(tmp_path / "nowhere.csv")


def test_spreadsheets_marks_and_empty_lines(write):
    table = write("\ufeffimage , g\r\n a.jpg , x\r\n\r\n".encode())
    assert [(row.line, row.image, dict(row.values)) for row in table.rows] == [
        (2, "a.jpg", {"g": "x"})
    ]


def test_a_mask_has_one_row(write):
    for text in ("image,g\na.jpg,x\nimages/a.jpg,y\n", "image,mask,g\na.jpg,1,x\na.jpg,1,x\n"):
        with pytest.raises(ConfigError, match="line 3 and line 2 are about the same mask"):
            join_attributes(write(text), RECORDS)


def test_no_group_at_all(write):
    table = write("image,g\nz.jpg,x\n")
    with pytest.raises(ConfigError, match="none of its 1 rows is about an evaluated mask"):
        means(table)
    names = "".join(f"a{i}.jpg,{i}\n" for i in range(60))
    with pytest.raises(ConfigError, match="column g has 61 values, such as"):
        means(write(f"image,g\n{names}a.jpg,x\n"))


MEASURES = ("random_1", "random_3", "box", "center_1")


def grouped(write, rng, num_images=60, measures=MEASURES, gap=0.3):
    """Records and a table of two groups, ``low`` and ``high``, the second better by the gap."""
    records, lines = [], ["image,g"]
    for number in range(num_images):
        is_high = number % 3 == 0
        base = rng.uniform(0.2, 0.4) + gap * is_high
        masks = [
            {m: base + rng.uniform(-0.02, 0.02) for m in measures}
            for _ in range(rng.integers(1, 6))
        ]
        records.append(record("d", f"{number}.jpg", *masks))
        lines.append(f"{number}.jpg,{'high' if is_high else 'low'}")
    return records, write("\n".join(lines))


def group_of(report, value):
    (found,) = [group for group in report.groups["g"] if group.value == value]
    return found


def test_intervals_of_masks_as_scipy_has_them(write):
    records, table = grouped(write, np.random.default_rng(0))
    report = mean_iou_by_group(table, join_attributes(table, records), unit="masks")
    assert report.measures == ("random_1", "random_3", "box")
    ious = [m["ious"]["box"] for r in records[::3] for m in r["masks"]]
    group = group_of(report, "high")
    assert (group.num_masks, group.num_images) == (len(ious), 20)
    assert group.means["box"] == pytest.approx(np.mean(ious), abs=1e-12)
    theirs = scipy.stats.bootstrap(
        (ious,), np.mean, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    np.testing.assert_allclose(group.intervals["box"], theirs, atol=0.05 * (theirs[1] - theirs[0]))


def test_intervals_of_images_as_scipy_has_them(write):
    records, table = grouped(write, np.random.default_rng(0))
    report = mean_iou_by_group(table, join_attributes(table, records))
    per_image = [[m["ious"]["box"] for m in r["masks"]] for r in records[::3]]
    sums, numbers = [sum(of) for of in per_image], [len(of) for of in per_image]
    theirs = scipy.stats.bootstrap(
        (sums, numbers),
        lambda s, n, axis: s.sum(axis=axis) / n.sum(axis=axis),
        paired=True,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    ours = group_of(report, "high").intervals["box"]
    np.testing.assert_allclose(ours, theirs, atol=0.05 * (theirs[1] - theirs[0]))
    # Masks of an image are alike: taken for independent ones, they would promise too much.
    of_masks = mean_iou_by_group(table, join_attributes(table, records), unit="masks")
    low, high = group_of(of_masks, "high").intervals["box"]
    assert high - low < 0.8 * (ours.high - ours.low)


@pytest.mark.parametrize("unit", ["images", "masks"])
def test_nothing_depends_on_the_order_of_records_or_rows(write, unit):
    rng = np.random.default_rng(2)
    records, table = grouped(write, rng)
    expected = mean_iou_by_group(table, join_attributes(table, records), unit=unit, num_draws=99)
    for of_image in records:
        of_image["masks"] = [of_image["masks"][i] for i in rng.permutation(len(of_image["masks"]))]
    records = [records[i] for i in rng.permutation(len(records))]
    lines = table.path.read_text().splitlines()
    table = write("\n".join([lines[0], *(lines[1:][i] for i in rng.permutation(len(lines) - 1))]))
    found = mean_iou_by_group(table, join_attributes(table, records), unit=unit, num_draws=99)
    for value in ("low", "high"):
        a, b = group_of(found, value), group_of(expected, value)
        np.testing.assert_allclose(list(a.means.values()), list(b.means.values()), rtol=1e-12)
        np.testing.assert_allclose(
            list(a.intervals.values()), list(b.intervals.values()), rtol=1e-12
        )


def test_groups_that_differ_are_pointed_out(write):
    records, table = grouped(write, np.random.default_rng(3))
    joined = join_attributes(table, records)
    report = mean_iou_by_group(table, joined, num_draws=200)
    assert [(d.lower, d.higher, d.measure) for d in report.disparities()] == [
        ("low", "high", measure) for measure in report.measures
    ]
    content = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert content["disjoint_intervals"][0] == {
        "attribute": "g",
        "measure": "random_1",
        "lower": "low",
        "higher": "high",
    }
    console = Console(width=100, record=True)
    report.print_table(console)
    text = console.export_text()
    assert "intervals do not overlap: g, box: low below high" in text
    assert max(map(len, text.splitlines())) <= 100
    records, table = grouped(write, np.random.default_rng(3), gap=0.0)
    assert not mean_iou_by_group(table, join_attributes(table, records)).disparities()


def test_one_image_gives_no_interval_and_no_disparity(write):
    records = [record("d", "0.jpg", 0.1, 0.2), *(record("d", f"{i}.jpg", 0.9) for i in range(1, 5))]
    table = write("image,g\n0.jpg,alone\n" + "".join(f"{i}.jpg,x\n" for i in range(1, 5)))
    report = mean_iou_by_group(table, join_attributes(table, records), num_draws=50)
    assert all(math.isnan(end) for end in group_of(report, "alone").intervals["center_1"])
    # Ties: all draws of equal IoUs are the same.
    assert group_of(report, "x").intervals["center_1"] == pytest.approx((0.9, 0.9))
    assert not report.disparities()
    assert "g alone: of one image there is no interval" in list(report.remarks())
    assert "intervals of fewer than 20 images are too short: g x (4)" in list(report.remarks())
    measured = report.as_json()["groups"]["g"]["alone"]["measures"]["center_1"]
    assert (measured["low"], measured["high"]) == (None, None)
    assert report.figure().std() > 10
    of_masks = mean_iou_by_group(table, join_attributes(table, records), num_draws=50, unit="masks")
    assert group_of(of_masks, "alone").intervals["center_1"].low >= 0.1 - 1e-12


def test_measures_that_are_compared_by_default(write):
    rng = np.random.default_rng(0)
    for measures, expected in (
        (("center_1", "center_3", "box"), ("center_1", "center_3", "box")),
        (("random_1", "center_1"), ("random_1",)),
    ):
        records, table = grouped(write, rng, measures=measures)
        joined = join_attributes(table, records)
        assert mean_iou_by_group(table, joined, num_draws=5).measures == expected
    with pytest.raises(ConfigError, match="no measure random_9; there are random_1, center_1"):
        mean_iou_by_group(table, joined, measures=["random_9"])
    records, table = grouped(write, rng, measures=("center_9",))
    with pytest.raises(ConfigError, match=r"which measure .* There are center_9"):
        mean_iou_by_group(table, join_attributes(table, records))


def test_names_with_brackets_are_printed_as_they_are(write):
    report, _ = means(write("image,hair [/x]\na.jpg,red [a]\nb.jpg,grey [/b]\n"))
    console = Console(width=100, record=True)
    report.print_table(console)
    text = console.export_text()
    assert text.splitlines()[0].rstrip() == "hair [/x]"
    assert "red [a] " in text
    assert "grey [/b] " in text
