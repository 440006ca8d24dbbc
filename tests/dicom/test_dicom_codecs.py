"""Decoders in child processes: what they are sent is hostile, and they may do anything but harm."""

import io
import os
import struct
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pydicom
import pytest
from conftest import save
from PIL import Image as Picture
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate, encapsulate_extended
from pydicom.pixels import pixel_array
from pydicom.uid import (
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from mm.dicom import codecs
from mm.dicom.codecs import Job, decode
from mm.dicom.errors import DicomError, FileError, PixelError
from mm.dicom.fragments import items_of
from mm.dicom.header import read_header
from mm.dicom.pixels import read_pixels, read_planes

for module in ("jpeg_ls", "libjpeg", "openjpeg", "rle"):
    pytest.importorskip(module, reason="no decoder installed: pip install 'mm-report[dicom]'")

FAKE = """
import importlib.util, os, sys, time
spec = importlib.util.spec_from_file_location("codec_worker", {path!r})
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)

def misbehave(codestream, num_pixels, bits):
    what = codestream.decode()
    if what == "abort":
        os.abort()
    if what == "spin":
        while True:
            pass
    if what == "sleep":
        time.sleep(60)
    if what == "eat":
        bytearray(4 << 30)
    if what == "print":
        print("into the pipe", flush=True)
    if what == "nothing":
        raise ValueError("patient data")
    return 0, bytes(num_pixels * bits // 8 + (what == "longer"))

worker.DECODE["libjpeg"] = misbehave
worker.main()
"""
JOB = Job("libjpeg", 4, 6, 1, 8)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    script = tmp_path / "fake.py"
    script.write_text(FAKE.format(path=str(codecs.SCRIPT)))
    codecs.close()
    monkeypatch.setattr(codecs, "SCRIPT", script)
    yield
    codecs.close()


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("abort", "decoder_crashed"),
        ("spin", "decoder_timeout"),
        ("eat", "decoder_failed"),
        ("longer", "codestream_mismatch"),
        ("nothing", "decoder_failed"),
    ],
)
def test_a_decoder_that_misbehaves_is_told_and_replaced(fake, what, reason):
    with pytest.raises(PixelError) as caught:
        decode(JOB, what.encode())
    assert caught.value.reason == reason
    assert decode(JOB, b"well").samples.tolist() == [0] * 24
    assert decode(JOB, b"print").samples.tolist() == [0] * 24


def test_a_decoder_that_waits_is_killed(fake, monkeypatch):
    monkeypatch.setattr(codecs, "PATIENCE", 1)
    decode(JOB, b"well")
    start = time.monotonic()
    with pytest.raises(PixelError, match="decoder_timeout"):
        decode(JOB, b"sleep")
    assert time.monotonic() - start < 30


def test_a_frame_doesnt_pay_for_the_one_before(fake):
    decode(JOB, b"well")
    (worker,) = codecs._pool.idle
    os.kill(worker.pid, 9)
    assert decode(JOB, b"well").samples.size == 24


def test_workers_are_few_and_end_with_their_pipes(fake):
    decode(JOB, b"well")
    decode(JOB, b"well")
    (worker,) = codecs._pool.idle
    codecs.close()
    assert not worker.is_alive


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process")
def test_a_forked_child_starts_its_own(fake):
    decode(JOB, b"well")
    mine = codecs._pool.idle[0].pid
    child = os.fork()
    if child == 0:
        good = decode(JOB, b"well").samples.size == 24 and codecs._pool.idle[0].pid != mine
        codecs.close()
        os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert decode(JOB, b"well").samples.size == 24
    assert codecs._pool.idle[0].pid == mine


def encapsulated(path, frames, syntax, pixels, *, extended=False, **elements):
    save(path, pixels, **elements)
    data = pydicom.dcmread(path)
    data.file_meta.TransferSyntaxUID = syntax
    if isinstance(frames, list) and len(frames) > 1:
        data.NumberOfFrames = len(frames)
    if extended:
        data.PixelData, data.ExtendedOffsetTable, data.ExtendedOffsetTableLengths = encapsulate_extended(frames)
    else:
        data.PixelData = frames if isinstance(frames, bytes) else encapsulate(frames)
    data["PixelData"].VR = "OB"
    data["PixelData"].is_undefined_length = True
    pydicom.dcmwrite(path, data, enforce_file_format=True)
    return read_header(path)


def jpeg2000(pixels):
    stream = io.BytesIO()
    Picture.fromarray(pixels).save(stream, "JPEG2000", no_jp2=True)
    return stream.getvalue()


GREY = np.add.outer(np.arange(32), np.arange(48)).astype(np.uint8)


def reason_of(instance):
    with pytest.raises(DicomError) as caught:
        read_pixels(instance)
    return caught.value.reason


def test_hostile_jpeg2000(tmp_path):
    good = jpeg2000(GREY)
    assert (read_pixels(encapsulated(tmp_path / "a", [good], JPEG2000Lossless, GREY)) == GREY).all()
    huge = good[:8] + struct.pack(">LL", 20000, 20000) + good[16:]
    assert reason_of(encapsulated(tmp_path / "b", [huge], JPEG2000Lossless, GREY)) == "codestream_mismatch"
    huge = good[:8] + struct.pack(">LL", 13000, 13000) + good[16:]
    both = replace(encapsulated(tmp_path / "c", [huge], JPEG2000Lossless, GREY), rows=13000, columns=13000)
    assert reason_of(both) == "expansion"
    many = good[:40] + struct.pack(">H", 16384) + good[42:43] * 3 * 16384
    assert reason_of(encapsulated(tmp_path / "d", [many], JPEG2000Lossless, GREY)) == "codestream_mismatch"
    colour = jpeg2000(np.stack([GREY] * 3, 2))
    assert reason_of(encapsulated(tmp_path / "e", [colour], JPEG2000Lossless, GREY)) == "codestream_mismatch"
    cut = encapsulated(tmp_path / "f", [good[:110]], JPEG2000Lossless, GREY)
    assert reason_of(cut) in ("decoder_failed", "codestream_mismatch")


def packed(planes):
    """RLE with literal runs only (PS3.5 annex G)."""
    segments = []
    for plane in planes:
        rows = [bytes([len(row) - 1]) + row for row in (bytes(plane[i : i + 48]) for i in range(0, len(plane), 48))]
        segments.append(b"".join(rows))
        segments[-1] += b"\0" * (len(segments[-1]) % 2)
    offsets = np.cumsum([64] + [len(item) for item in segments]).tolist()[:-1]
    return struct.pack("<16L", len(segments), *offsets, *[0] * (15 - len(segments))) + b"".join(segments)


def test_rle_segments_come_most_significant_first(tmp_path):
    pixels = (GREY.astype(np.int16) * 300 - 20000).astype(np.int16)
    raw = pixels.view(np.uint16)
    good = packed([(raw >> 8).astype(np.uint8).ravel(), (raw & 255).astype(np.uint8).ravel()])
    assert (read_pixels(encapsulated(tmp_path / "a", [good], RLELossless, pixels)) == pixels).all()
    for name, bad in {
        "one segment": packed([GREY.ravel()]),
        "beyond the end": good[:8] + struct.pack("<L", 1 << 30) + good[12:],
        "backwards": good[:4] + good[8:12] + good[4:8] + good[12:],
        "sixteen": struct.pack("<L", 16) + good[4:],
        "no header": good[:40],
        "too short": good[: 64 + 30],
    }.items():
        assert reason_of(encapsulated(tmp_path / name, [bad], RLELossless, pixels)) == "codestream_mismatch", name
    starved = good[:64] + b"\0" * (len(good) - 64)
    assert reason_of(encapsulated(tmp_path / "starved", [starved], RLELossless, pixels)) == "decoder_failed"


HTJ2K = bytes.fromhex(
    "ff4fff5100294000000000080000000800000000000000000000000800000008000000000000000000018f0101ff50000800020000000a"
    "ff52000c00020001000504044001ff5c00132088909090909090909090909090888888ff64001700014f70656e4a50482056657220302e"
    "32362e332eff90000a0000000000580001ff93c00025e2008774000000c00012c00013009a01077400d8fc02877400c00013400013808a"
    "f200827400628af900835400c0002a200015600000f0aa700275000e1d1c1cfec03181ecb600ffd9"
)
"""17 x - 300 for x from 0 to 63 in 8 x 8, written by OpenJPH."""


def test_high_throughput_jpeg2000(tmp_path):
    expected = (np.arange(64).reshape(8, 8) * 17 - 300).astype(np.int16)
    assert (read_pixels(encapsulated(tmp_path / "a", [HTJ2K], HTJ2KLossless, expected)) == expected).all()


def fragment(content):
    return b"\xfe\xff\x00\xe0" + struct.pack("<L", len(content)) + content


def test_frames_are_found_however_they_are_cut(tmp_path):
    frames = [jpeg2000(np.roll(GREY, step, 0)) for step in range(4)]
    frames = [frame + b"\0" * (len(frame) % 2) for frame in frames]
    halves = [b"".join(fragment(part) for part in (frame[:200], frame[200:])) for frame in frames]
    starts = np.cumsum([0] + [len(item) for item in halves])[:-1]
    table = fragment(np.asarray(starts, "<u4").tobytes())
    end = b"\xfe\xff\xdd\xe0" + b"\0" * 4
    for name, content in {
        "plain": encapsulate(frames, has_bot=False),
        "basic": encapsulate(frames),
        "halves and a table": table + b"".join(halves) + end,
        "halves alone": fragment(b"") + b"".join(halves) + end,
        "no end": fragment(b"") + b"".join(fragment(frame) for frame in frames),
        "extended": frames,
    }.items():
        extended = name == "extended"
        kept = encapsulated(tmp_path / name, content, JPEG2000Lossless, GREY, extended=extended, NumberOfFrames=4)
        if extended:
            assert kept.num_frames == 4
        for step in range(4):
            assert (read_pixels(kept, step) == np.roll(GREY, step, 0)).all(), name
        planes = list(read_planes([replace(kept.frame, index=step) for step in (2, 0, 3, 1, 2)]))
        assert all((plane == np.roll(GREY, step, 0)).all() for plane, step in zip(planes, (2, 0, 3, 1, 2), strict=True))
    with pytest.raises(ValueError, match="index"):
        read_pixels(kept, 4)
    two = fragment(b"") + b"".join(halves)[: len(halves[0])] + end
    lost = encapsulated(tmp_path / "lost", two, JPEG2000Lossless, GREY, NumberOfFrames=4)
    assert reason_of(lost) == "damaged"


@pytest.mark.parametrize("claim", [1 << 31, 0xFFFFFFFF, 1 << 20])
def test_an_item_longer_than_the_file_is_truncated(tmp_path, claim):
    frame = jpeg2000(GREY)
    lie = b"\xfe\xff\x00\xe0" + struct.pack("<L", claim)
    kept = encapsulated(tmp_path / "fragment", fragment(b"") + lie + frame, JPEG2000Lossless, GREY)
    assert reason_of(kept) == "truncated"
    kept = encapsulated(tmp_path / "table", lie + frame, JPEG2000Lossless, GREY)
    assert reason_of(kept) == "truncated"
    with pytest.raises(FileError, match="truncated"):
        items_of(fragment(b"") + lie + frame)


def test_an_error_ends_the_planes_there(tmp_path):
    good, bad = jpeg2000(GREY), b"\xff\x4f\xff\x51" + b"\0" * 100
    kept = encapsulated(tmp_path / "a", [good, bad, good], JPEG2000Lossless, GREY)
    planes = read_planes([replace(kept.frame, index=step) for step in range(3)])
    assert (next(planes) == GREY).all()
    with pytest.raises(PixelError, match="codestream_mismatch"):
        next(planes)


@pytest.mark.parametrize(
    "name",
    [
        "JPEGLSNearLossless_08.dcm",
        "JPEGLSNearLossless_16.dcm",
        "JPGExtended.dcm",
        "JPEG2000.dcm",
        "J2K_pixelrep_mismatch.dcm",
        "693_J2KI.dcm",
        "MR_small_jp2klossless.dcm",
        "MR_small_jpeg_ls_lossless.dcm",
        "MR_small_RLE.dcm",
        "MR_small_bigendian.dcm",
        "rtdose_rle.dcm",
        "rtdose_expb.dcm",
        "image_dfl.dcm",
        "examples_overlay.dcm",
        "liver_1frame.dcm",
        "liver_expb_1frame.dcm",
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_pydicoms_files_are_read_as_pydicom_reads_them(tmp_path, name):
    data = pydicom.dcmread(get_testdata_file(name, download=False))
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
        setattr(data, keyword, data.get(keyword) or "1.2.3")
    data.save_as(tmp_path / "a")
    instance = read_header(tmp_path / "a")
    for index in {0, instance.num_frames - 1}:
        expected = pixel_array(data, index=index, raw=True)
        if name == "examples_overlay.dcm":
            expected = expected & 0xFFF
        found = read_pixels(instance, index)
        assert found.dtype == expected.dtype.newbyteorder("=")
        np.testing.assert_array_equal(found, expected)


def test_pairs_of_compressed_and_uncompressed_files():
    plain, *others = (
        read_pixels(read_header(Path(get_testdata_file(name, download=False))))
        for name in ("MR_small.dcm", "MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm")
    )
    for other in others:
        np.testing.assert_array_equal(other, plain)


def test_nine_encodings_of_one_image(real):
    kept = [read_header(path) for path in sorted((real / "dcm_qa_ts" / "In").iterdir())]
    lossless = [item for item in kept if item.transfer_syntax_uid != JPEGBaseline8Bit]
    assert len({item.transfer_syntax_uid for item in lossless}) >= 6
    first, *rest = (read_pixels(item) for item in lossless)
    for pixels in rest:
        np.testing.assert_array_equal(pixels, first)


def test_planes_come_in_order(real):
    paths = sorted((real / "dicom2nifti" / "generic" / "compressed_jpegls" / "001").glob("*.dcm"))[:12]
    frames = [read_header(path).frame for path in paths]
    assert {frame.instance.transfer_syntax_uid for frame in frames} != {ExplicitVRLittleEndian}
    planes = list(read_planes(frames))
    for frame, plane in zip(frames, planes, strict=True):
        np.testing.assert_array_equal(plane, read_pixels(frame.instance))
    assert any((a != b).any() for a, b in pairwise(planes))


@pytest.mark.parametrize("syntax", [JPEGLosslessSV1, JPEGLSLossless])
def test_garbage_is_refused(tmp_path, syntax):
    for length in (0, 1, 9, 200):
        noise = np.random.default_rng(length).bytes(length)
        name = f"{length}"
        assert reason_of(encapsulated(tmp_path / name, [noise or b"\0\0"], syntax, GREY)) == "codestream_mismatch"


def test_grey_baseline_jpeg_needs_no_extra(tmp_path, monkeypatch):
    stream = io.BytesIO()
    Picture.fromarray(GREY).save(stream, "JPEG", quality=95)
    kept = encapsulated(tmp_path / "a", [stream.getvalue()], JPEGBaseline8Bit, GREY)
    ours = read_pixels(kept)
    monkeypatch.setattr("mm.dicom.pixels.is_installed", lambda decoder: decoder != "libjpeg")
    assert np.abs(read_pixels(kept).astype(int) - ours).max() <= 1


def test_large_frames_stay_within_the_limits(tmp_path):
    openjpeg = pytest.importorskip("openjpeg.utils")
    noise = np.random.default_rng(0).normal(2000, 30, (1200, 1500)).astype(np.uint16)
    frame = bytes(openjpeg.encode_array(noise, photometric_interpretation=2, bits_stored=12))
    kept = encapsulated(tmp_path / "a", [frame], JPEG2000Lossless, noise, BitsStored=12, HighBit=11)
    assert (read_pixels(kept) == noise).all()
