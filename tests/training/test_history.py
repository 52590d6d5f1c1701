import struct
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from adapterd.training.curve import loss_curve
from adapterd.training.history import StepRecord, TensorBoardLog, as_csv

HISTORY = [
    StepRecord(0, valid_loss=2.0, valid_accuracy=0.1),
    StepRecord(1, 2.5, 0.0),
    StepRecord(2, 1.5, 0.5, 1.25, 0.625),
]


def test_csv_is_openais_result_file() -> None:
    assert as_csv(HISTORY).splitlines() == [
        "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy",
        "0,,,2.000000,0.100000",
        "1,2.500000,0.000000,,",
        "2,1.500000,0.500000,1.250000,0.625000",
    ]


def events(directory: Path) -> list[tuple[str, int, float]]:
    """What a TensorBoard would read: records of length, checksum, event, checksum."""
    found = []
    for path in sorted(directory.glob("events.*")):
        data, place = path.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            event = Event.FromString(data[place + 12 : place + 12 + length])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            place += 16 + length
    return found


def test_tensorboard_gets_the_same_figures(tmp_path: Path) -> None:
    log = TensorBoardLog(tmp_path, first_step=1)
    for record in HISTORY[1:]:
        log.add(record, 1e-3)
    log.close()
    written = events(tmp_path)
    assert ("train/loss", 1, 2.5) in written
    assert ("valid/loss", 2, 1.25) in written
    assert ("learning_rate", 2, pytest.approx(1e-3)) in written
    assert len(written) == 3 + 5


def test_no_directory_is_no_log() -> None:
    log = TensorBoardLog(None, first_step=1)
    log.add(HISTORY[1], 1e-3)
    log.close()


@pytest.mark.parametrize(
    "history",
    [
        HISTORY,
        HISTORY[:1],
        [],
        [StepRecord(i, 5 / (i + 1), 0.5, 3.0 if i % 7 == 0 else None) for i in range(1, 4000)],
        [StepRecord(1, 1.0, 1.0), StepRecord(2, 1.0, 1.0)],
        [StepRecord(1, 1e-9, 1.0), StepRecord(2, 1e6, 1.0)],
    ],
)
def test_curve_is_a_picture_with_all_points_inside(history: list[StepRecord]) -> None:
    root = ElementTree.fromstring(loss_curve(history, best_step=len(history), title="a <b> & c: loss"))
    lines = [node.get("points", "") for node in root.iter("{http://www.w3.org/2000/svg}polyline")]
    points = [tuple(map(float, point.split(","))) for line in lines for point in line.split()]
    assert len(points) <= 1000
    assert bool(points) == bool(history)
    assert all(0 <= x <= 720 and 0 <= y <= 300 for x, y in points)
