"""The peers of post-processing and search: no times without equal results; ratios within each turn."""

from __future__ import annotations

import numpy as np
import pytest
from cloudrt.bench import peers, postprocess, search
from cloudrt.bench.agreement import AgreementError
from support import reference
from support.shapes import checkerboard, smooth_map

from cloudrt.masks.rule import Rule


@pytest.mark.parametrize("name", peers.PEERS)
@pytest.mark.parametrize("kind", ["noise", "smooth", "empty", "full", "checkerboard"])
def test_every_peer_gives_the_text_of_the_plain_reference(name: str, kind: str) -> None:
    rng = np.random.default_rng(3)
    levels = {
        "noise": rng.integers(0, 256, (41, 60), dtype=np.uint8),
        "smooth": smooth_map(rng, 41, 60),
        "empty": np.zeros((41, 60), np.uint8),
        "full": np.full((41, 60), 255, np.uint8),
        "checkerboard": checkerboard(41, 60) * 255,
    }[kind]
    peer, _ = peers.PEERS[name]
    for min_area in (0, 3, 40):
        expected = reference.postprocess(levels, 120, min_area)
        assert peer(levels, False, 120, min_area) == expected
        assert peer(np.ascontiguousarray(levels.T), True, 120, min_area) == expected
        assert peer(levels / np.float32(255), False, 120.5 / 255, min_area) == expected


@pytest.mark.parametrize("name", peers.PEERS)
def test_a_peer_with_other_results_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    peer, module = peers.PEERS[name]
    monkeypatch.setitem(peers.PEERS, name, (lambda *words: peer(*words)[:-1], module))
    with pytest.raises(AgreementError, match=name):
        postprocess.measure({"smooth": postprocess.draw_maps("smooth", 1, (60, 80))}, lambda: None, turns=1)


def test_a_peer_that_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "installed", lambda module: module == "cv2")
    (one, _) = postprocess.measure({"smooth": postprocess.draw_maps("smooth", 1, (60, 80))}, lambda: None, turns=1)
    assert [peer.name for peer in one.peers] == ["notebook", "OpenCV", "OpenCV, 16 bits", "floor"]


def test_ratios_are_taken_turn_by_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine three times as slow in every other turn leaves the ratio as it is."""
    now = [0.0]
    turn = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def spend(seconds: float) -> None:
        now[0] += seconds * (3 if int(turn[0]) % 2 else 1)

    def theirs() -> None:
        spend(0.1)

    def ours() -> None:
        turn[0] += 0.5  # each turn has a warm-up call and a timed call
        spend(0.02)

    seconds, (peer,) = postprocess.compare(ours, {"peer": theirs}, 2, 5)
    assert any(seconds == pytest.approx(expected) for expected in (0.01, 0.03))  # per map, of two maps per call
    assert (peer.low, peer.ratio, peer.high) == pytest.approx((5, 5, 5))


def test_the_nested_loops_must_give_the_dice_of_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    maps = [np.ascontiguousarray([smooth_map(rng, 120, 160, 20).T]) for _ in range(3)]
    images = search.label_maps(maps, [Rule(120, 0)])
    done = search.measure_search(images, lambda: None, sample=5)
    assert (done.images, done.classes, done.thresholds, done.min_areas) == (3, 1, 140, 17)
    monkeypatch.setattr(search, "loop_dice", lambda *_: 2.0)
    with pytest.raises(AgreementError, match="nested loops score"):
        search.measure_search(images, lambda: None, sample=1)
