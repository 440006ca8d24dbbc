"""The finding head: it learns places, sides and sizes from a handful of volumes; absent sources mean the prior."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from mm import ontology
from mm.batch import BySource, Targets, Tokens
from mm.finding_maps import NUM_FINDINGS, PEAKS, decode_size, encode_size
from mm.findings import Evidence, FindingHead, FindingOutputs
from mm.history import IMPOSSIBLE

NODULE, EFFUSION, FRACTURE = (ontology.INDEX[code] for code in ("nodule", "effusion", "rib_fracture"))
INFECTION, AIRFLOW = ontology.INDEX["infection"], ontology.INDEX["airflow_obstruction"]
SHAPE, STRIDE = (16, 32, 32), (2, 4, 4)


class TinyPyramid(nn.Module):
    """Stands for an encoder: four levels from a volume."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            nn.Sequential(nn.Conv3d(a, b, 3, stride=s, padding=1), nn.GroupNorm(2, b), nn.GELU())
            for a, b, s in ((1, 8, (1, 2, 2)), (8, 16, 2), (16, 16, 2), (16, 16, 2))
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        levels = []
        for level in self.levels:
            x = level(x)
            levels.append(x)
        return tuple(levels)


def make_head(**options: object) -> FindingHead:
    sizes = {"width": 32, "channels": 16, "image_channels": 16, "hidden": 32, "history": 16, "audio_width": 24}
    sizes |= {"record_width": 24, "image_widths": (8, 12), "volume_widths": (8, 16, 16, 16)}
    return FindingHead(**(sizes | options))


def blank_targets(studies: int, visits: int = 1) -> Targets:
    B, V = studies, visits
    K, instances = NUM_FINDINGS, ontology.MAX_INSTANCES
    return Targets(
        present=torch.zeros(B, K, dtype=torch.bool),
        change=torch.zeros(B, K, dtype=torch.long),
        volume_bits=torch.zeros(B, V, *SHAPE, dtype=torch.int16),
        count=torch.zeros(B, V, K, dtype=torch.long),
        centers=torch.zeros(B, V, K, instances, 3),
        sizes=torch.zeros(B, V, K, instances),
        sides=torch.zeros(B, V, K, instances, dtype=torch.long),
        image_bits=torch.zeros(B, 64, 64, dtype=torch.int16),
        image_count=torch.zeros(B, K, dtype=torch.long),
        image_centers=torch.zeros(B, K, instances, 2),
        image_sides=torch.zeros(B, K, instances, dtype=torch.long),
    )


def blobs() -> tuple[Tensor, Targets]:
    """Four volumes: a bright point left, a bright point right, two of them, a wide dark region left."""
    x, targets = 0.1 * torch.randn(4, 1, *SHAPE), blank_targets(4)
    places = {0: [((5, 9, 22), "left")], 1: [((9, 21, 8), "right")], 2: [((4, 8, 7), "right"), ((11, 22, 25), "left")]}
    assert targets.volume_bits is not None
    assert targets.count is not None
    for b, found in places.items():
        for i, ((z, y, c), side) in enumerate(found):
            x[b, 0, z, y : y + 2, c : c + 2] = 4
            targets.volume_bits[b, 0, z, y : y + 2, c : c + 2] = 1 << NODULE
            targets.centers[b, 0, NODULE, i] = torch.tensor([z, y + 0.5, c + 0.5])
            targets.sizes[b, 0, NODULE, i] = 6.0
            targets.sides[b, 0, NODULE, i] = ontology.SIDES.index(side)
        targets.count[b, 0, NODULE] = len(found)
        targets.present[b, NODULE] = True
    x[3, 0, 2:10, 16:28, 18:30] = -3
    targets.volume_bits[3, 0, 2:10, 16:28, 18:30] = 1 << EFFUSION
    targets.centers[3, 0, EFFUSION, 0] = torch.tensor([5.5, 21.5, 23.5])
    targets.sizes[3, 0, EFFUSION, 0] = 400.0
    targets.sides[3, 0, EFFUSION, 0] = ontology.SIDES.index("left")
    targets.count[3, 0, EFFUSION] = 1
    targets.present[3, EFFUSION] = True
    return x, targets


def look(head: FindingHead, net: nn.Module, x: Tensor, *, visits: int = 1) -> FindingOutputs:
    B = len(x) // visits
    study = torch.arange(B).repeat_interleave(visits)
    visit = torch.arange(visits).repeat(B)
    maps = head.see_volumes(net(x), study=study, visit=visit)
    days = torch.zeros(B, visits)
    days[:, 1:] = 90
    history = head.follow(maps, count=torch.full((B,), visits), days=days)
    return head(BySource(volume=head.pictured(maps, size=B)), size=B, history=history, volume=maps)


def test_overfits_four_volumes_in_seconds() -> None:
    torch.manual_seed(0)
    head, net = make_head(source_dropout=0.0), TinyPyramid()
    x, targets = blobs()
    optimiser = torch.optim.AdamW([*head.parameters(), *net.parameters()], lr=4e-3)
    for _ in range(100):
        loss = sum(head.losses(look(head, net, x), targets).values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    head.eval()
    found = head.decode(look(head, net, x))
    for b in range(3):
        rows = [row for row in found[b] if row.present]
        assert {row.code for row in rows} == {"nodule"}
        count = int(targets.count[b, 0, NODULE])
        assert len(rows) == count
        for i in range(count):
            truth = targets.centers[b, 0, NODULE, i]
            row = min(rows, key=lambda item: float((torch.tensor(item.voxel) - truth).norm()))
            assert all(abs(a - t) <= s for a, t, s in zip(row.voxel, truth.tolist(), STRIDE, strict=True))
            assert row.side == ontology.SIDES[int(targets.sides[b, 0, NODULE, i])]
            assert row.size == pytest.approx(6.0, rel=0.25)
    (row,) = [row for row in found[3] if row.present]
    assert (row.code, row.side) == ("effusion", "left")
    assert row.size == pytest.approx(400.0, rel=0.3)
    assert all(abs(a - t) <= s for a, t, s in zip(row.voxel, (5.5, 21.5, 23.5), STRIDE, strict=True))


def everything(head: FindingHead) -> tuple[FindingOutputs, Targets, nn.Module]:
    """Two studies with every source and a prior, some of everything true."""
    net = TinyPyramid()
    study, visit = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    volume = head.see_volumes(net(torch.randn(4, 1, *SHAPE)), study=study, visit=visit)
    image = head.see_images((torch.randn(2, 8, 8, 8), torch.randn(2, 12, 4, 4)), study=torch.tensor([0, 1]))
    tokens = Tokens(torch.randn(2, 5, 24), torch.ones(2, 5, dtype=torch.bool))
    evidence = BySource(
        head.pictured(volume, size=2), head.pictured(image, size=2), head.hear(tokens), head.read(tokens)
    )
    history = head.follow(volume, count=torch.tensor([2, 2]), days=torch.tensor([[0.0, 30.0], [0.0, 90.0]]))
    outputs = head(evidence, size=2, history=history, volume=volume, image=image)
    targets = blank_targets(2, 2)
    assert targets.volume_bits is not None
    assert targets.count is not None
    targets.present[0] = True
    targets.change[0] = ontology.CHANGES.index("larger")
    targets.volume_bits[:, :, 4:8, 8:16, 8:16] = (1 << NODULE) | (1 << EFFUSION)
    for k in (NODULE, EFFUSION):
        targets.count[:, :, k], targets.centers[:, :, k, 0] = 1, torch.tensor([5.5, 11.5, 11.5])
        targets.sizes[:, :, k, 0], targets.sides[:, :, k, 0] = 20.0, 2
        targets.image_count[:, k], targets.image_centers[:, k, 0] = 1, torch.tensor([20.0, 30.0])
        targets.image_sides[:, k, 0] = 2
    targets.image_bits[:, 16:32, 16:40] = (1 << NODULE) | (1 << EFFUSION)
    return outputs, targets, net


def test_gradient_reaches_every_parameter() -> None:
    torch.manual_seed(0)
    head = make_head(source_dropout=0.0)
    outputs, targets, _ = everything(head)
    losses = head.losses(outputs, targets)
    # The prior is learnt where a source is there and isn't heard.
    head.source_dropout = 0.999
    unheard, _, _ = everything(head)
    total = sum(losses.values()) + head.losses(unheard, targets)["presence"] + outputs.tokens.square().mean()
    total.backward()
    missing = [name for name, item in head.named_parameters() if item.grad is None or not item.grad.abs().sum() > 0]
    assert missing == []
    assert all(torch.isfinite(value) for value in losses.values())


def test_what_no_source_can_show_is_not_asked() -> None:
    head = make_head(source_dropout=0.0)
    _, targets, _ = everything(head)
    tokens = Tokens(torch.randn(2, 5, 24), torch.ones(2, 5, dtype=torch.bool))
    only_audio = head(BySource(audio=head.hear(tokens)), size=2)
    head.losses(only_audio, targets)["presence"].backward()
    taught = head.out.bias.grad.nonzero().flatten().tolist()
    assert taught == [ontology.INDEX["airflow_obstruction"]]
    assert head.losses(head(BySource(), size=2), targets)["presence"] == 0


def test_without_a_source_presence_is_the_prior() -> None:
    head = make_head().eval()
    outputs, _, _ = everything(head)
    nothing = head(BySource(), size=2)
    prior = head.prior.weight[:, 0].expand(2, -1)
    assert torch.equal(nothing.presence, prior)
    tokens = Tokens(torch.randn(2, 5, 24), torch.tensor([[True] * 5, [False] * 5]))
    only_audio = head(BySource(audio=head.hear(tokens)), size=2)
    assert torch.equal(only_audio.presence[:, NODULE], prior[:, NODULE])
    assert only_audio.presence[0, AIRFLOW] != prior[0, AIRFLOW]
    assert only_audio.presence[1, AIRFLOW] == prior[1, AIRFLOW]
    assert (outputs.presence != prior).all()


def test_a_source_that_cannot_show_a_finding_is_not_heard() -> None:
    head = make_head().eval()
    evidence = Evidence(torch.randn(2, NUM_FINDINGS, 32), torch.randn(2, NUM_FINDINGS), torch.ones(2, dtype=torch.bool))
    with_record = head(BySource(record=evidence), size=2).presence
    prior = head.prior.weight[:, 0]
    for k, item in enumerate(ontology.FINDINGS):
        assert torch.equal(with_record[:, k] == prior[k], torch.full((2,), "record" not in item.sources))


def test_change_is_unknown_without_priors() -> None:
    head, net = make_head().eval(), TinyPyramid()
    outputs = look(head, net, torch.randn(2, 1, *SHAPE))
    assert (outputs.change.argmax(-1) == 0).all()
    assert (outputs.before <= IMPOSSIBLE).all()
    assert all(row.change == "unknown" for rows in head.decode(outputs) for row in rows)
    compared = look(head, net, torch.randn(4, 1, *SHAPE), visits=2)
    followed = torch.tensor([item.followed for item in ontology.FINDINGS])
    assert torch.equal(compared.change.argmax(-1) != 0, followed.expand(2, -1))


def test_absent_codes_have_a_row_and_resolved_ones_say_so() -> None:
    head, net = make_head().eval(), TinyPyramid()
    outputs = look(head, net, torch.randn(4, 1, *SHAPE), visits=2)
    change = torch.zeros_like(outputs.change)
    change[0, NODULE, ontology.CHANGES.index("resolved")] = 5
    before = torch.full_like(outputs.before, -5)
    before[0, NODULE] = 5
    presence = torch.full_like(outputs.presence, -5)
    rows = head.decode(replace(outputs, presence=presence, change=change, before=before))
    assert [row.code for row in rows[0]] == list(ontology.CODES)
    assert not any(row.present for row in rows[0])
    assert [row.code for row in rows[0] if row.change == "resolved"] == ["nodule"]
    assert rows[0][NODULE].side in ("left", "right")
    assert all(row.change == "unknown" for row in rows[1])


def test_fracture_seen_on_the_image_alone_has_a_pixel_and_no_voxel() -> None:
    head = make_head().eval()
    with torch.no_grad():
        outputs, _, _ = everything(head)
    assert outputs.volume is not None
    assert outputs.image is not None
    outputs.presence[0, FRACTURE] = 9
    outputs.volume.maps[:, FRACTURE] = -9
    outputs.image.maps[0, FRACTURE] = -9
    outputs.image.maps[0, FRACTURE, 1, 2] = 6
    (row,) = [row for row in head.decode(outputs)[0] if row.code == "rib_fracture"]
    assert row.present
    assert row.voxel is None
    assert row.pixel is not None
    assert row.size is None


def test_at_most_eight_instances_far_enough_apart() -> None:
    head, net = make_head().eval(), TinyPyramid()
    with torch.no_grad():
        outputs = look(head, net, torch.randn(1, 1, *SHAPE))
    assert outputs.volume is not None
    outputs.presence[0, NODULE] = 9
    outputs.volume.maps[0, NODULE] = torch.randn_like(outputs.volume.maps[0, NODULE]) + 3
    rows = [row for row in head.decode(outputs)[0] if row.code == "nodule"]
    assert 1 < len(rows) <= ontology.MAX_INSTANCES
    places = torch.tensor([row.voxel for row in rows]) * torch.tensor(head.spacing_mm)
    apart = torch.cdist(places, places) + 1e3 * torch.eye(len(rows))
    assert apart.min() >= ontology.FINDINGS[NODULE].separation_mm - 1e-3


def test_what_no_input_can_show_is_never_asserted() -> None:
    head = make_head().eval()
    head.threshold.fill_(0.01)  # the prior lies above it
    tokens = Tokens(torch.randn(2, 5, 24), torch.tensor([[True] * 5, [False] * 5]))
    evidence = head.hear(tokens)
    outputs = head(BySource(audio=replace(evidence, logits=torch.full_like(evidence.logits, 9.0))), size=2)
    rows = head.decode(outputs)
    assert [row.code for row in rows[0] if row.present] == ["airflow_obstruction"]
    assert not any(row.present for row in rows[1])
    assert rows[1][NODULE].probability == pytest.approx(float(head.prior.weight.detach()[NODULE].sigmoid()))
    assert any(row.present for row in head.decode(replace(outputs, assessable=None))[1])


def test_side_and_place_never_contradict() -> None:
    head, net = make_head().eval(), TinyPyramid()
    with torch.no_grad():
        outputs = look(head, net, torch.randn(1, 1, *SHAPE))
    assert outputs.volume is not None
    outputs.presence[0, NODULE] = 9
    outputs.volume.maps[0, NODULE] = -9
    outputs.volume.maps[0, NODULE, 2, 4, 0] = outputs.volume.maps[0, NODULE, 5, 4, 7] = 6
    for logit in (9.0, -9.0):
        outputs.volume.side[0] = logit
        rows = [row for row in head.decode(outputs)[0] if row.code == "nodule"]
        assert len(rows) == 2
        for row in rows:
            assert row.voxel is not None
            assert row.side == ("left" if row.voxel[2] > 15.5 else "right")


@pytest.mark.parametrize("on_image", [1, 2])
def test_one_of_each_picture_on_a_side_is_a_pair(on_image: int) -> None:
    head = make_head().eval()
    with torch.no_grad():
        outputs, _, _ = everything(head)
    assert outputs.volume is not None
    assert outputs.image is not None
    outputs.presence[0, NODULE] = 9
    outputs.volume.maps[:, NODULE] = outputs.image.maps[:, NODULE] = -9
    outputs.volume.maps[0, NODULE, 5, 4, 7] = 6
    outputs.volume.side[:], outputs.image.side[:] = 9, 9
    for row in range(on_image):
        outputs.image.maps[0, NODULE, 3 * row, 3] = 6
    rows = [row for row in head.decode(outputs)[0] if row.code == "nodule"]
    assert len(rows) == 1
    assert (rows[0].pixel is None) == (on_image == 2)


def test_sizes_survive_their_code() -> None:
    for k, item in enumerate(ontology.FINDINGS):
        if item.measure is not None:
            size = torch.tensor([max(item.measure.low, item.measure.high / 100), item.measure.moderate])
            back = decode_size(encode_size(size, torch.tensor(k)), torch.tensor(k))
            assert torch.allclose(back, size, rtol=1e-5)
    assert {ontology.CODES[k] for k in PEAKS} == {"nodule", "rib_fracture", "calcification"}


def test_calibration_fits_scale_and_threshold() -> None:
    torch.manual_seed(0)
    head = make_head()
    true_logit = 2 * torch.randn(4000, NUM_FINDINGS)
    labels = torch.rand_like(true_logit) < true_logit.sigmoid()
    raw = 3 * true_logit + 1.5
    head.calibrate(raw, labels)
    assert (head.probability(raw) - true_logit.sigmoid()).abs().max() < 0.05
    predicted = head.probability(raw) >= head.threshold

    def f1(guess: Tensor) -> Tensor:
        return 2 * (guess & labels).sum(0) / (guess.sum(0) + labels.sum(0))

    best = torch.stack([f1(head.probability(raw) >= t) for t in torch.linspace(0.05, 0.95, 50)]).amax(0)
    assert (f1(predicted) >= best - 1e-6).all()
    none = make_head()
    none.calibrate(raw[:10], torch.zeros(10, NUM_FINDINGS, dtype=torch.bool))
    assert torch.equal(none.threshold, torch.full((NUM_FINDINGS,), 0.5))


def test_what_the_prior_shows_is_calibrated_on_studies_with_a_prior_alone() -> None:
    head = make_head()
    labels = torch.rand(200, NUM_FINDINGS, generator=torch.Generator().manual_seed(0)) < 0.3
    before = torch.where(labels, -1.0, -3.0)  # told apart, but below the threshold that the head begins with
    without = torch.full((100, NUM_FINDINGS), 2 * IMPOSSIBLE)
    head.calibrate_before(torch.cat([before, without]), torch.cat([labels, ~labels[:100]]))
    assert torch.equal(before.sigmoid() >= head.before_threshold, labels)
    kept = head.before_threshold.clone()
    head.calibrate_before(without, ~labels[:100])
    assert torch.equal(head.before_threshold, kept)


def test_wrong_dropout_is_refused() -> None:
    with pytest.raises(ValueError, match="source_dropout"):
        make_head(source_dropout=1.0)
