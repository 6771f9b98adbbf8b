from __future__ import annotations

import io
import math
import random
import struct
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from tessera.modalities.audio import (
    MAX_CHANNELS,
    load_audio,
    log_mel,
    loudness,
    normalize_loudness,
    normalize_peak,
    pad_batch,
    random_crop,
    read_record,
    resample,
    save_audio,
    spectrogram_image,
    to_channels,
    trim_silence,
    unpad_batch,
    waveform_image,
    write_audio,
)
from tessera.modalities.errors import InputError
from tessera.modalities.metadata import make_record

RATE = 24_000


def tone(seconds=0.5, rate=RATE, hertz=440.0, channels=1, level=0.5):
    wave = level * torch.sin(2 * math.pi * hertz * torch.arange(round(seconds * rate)) / rate)
    return wave.repeat(channels, 1)


def write_av(path, audio, rate, codec, picture=False):
    """A file by PyAV: the sound, and a black picture where asked for."""
    with av.open(str(path), "w") as container:
        if picture:
            video = container.add_stream("mpeg4", rate=10)
            video.width = video.height = 32
        if audio is not None:
            stream = container.add_stream(codec, rate=rate, layout="mono")
            frame = av.AudioFrame.from_ndarray(audio.numpy(), format="fltp", layout="mono")
            frame.sample_rate = rate
            for packet in [*stream.encode(frame), *stream.encode(None)]:
                container.mux(packet)
        if picture:
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            for packet in [*video.encode(frame), *video.encode(None)]:
                container.mux(packet)


def float_wav(samples, rate=RATE):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


@pytest.fixture
def record():
    settings = {"temperature": 0.8, "speed": 1.0}
    return make_record(
        "TextToSpeechPipeline", "voice", "Grüße, der Kessel kocht 😀", 7, 0, settings,
        torch.arange(4000) % 4096, "voice",
    )  # fmt: skip


# --- Reading ---


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".opus"])
def test_what_is_saved_is_read_from_path_bytes_and_file(tmp_path, suffix):
    audio, path = tone(channels=2), tmp_path / f"a{suffix}"
    audio[1] *= 0.5
    save_audio(audio, RATE, path)
    loaded, rate = load_audio(path)
    assert rate == RATE and loaded.shape == audio.shape and loaded.dtype == torch.float32
    lossless = suffix in (".wav", ".flac")
    error = (loaded - audio)[:, : -RATE // 20].abs().max()  # Opus fades an abrupt end.
    assert error < (1e-4 if lossless else 0.1)
    for source in (str(path), path.read_bytes(), io.BytesIO(path.read_bytes())):
        again, rate = load_audio(source)
        assert rate == RATE and torch.equal(again, loaded)


def test_mp3_m4a_and_the_sound_of_a_video(tmp_path):
    audio = tone(1.0)
    soundfile.write(tmp_path / "a.mp3", audio[0].numpy(), RATE, format="MP3")
    write_av(tmp_path / "a.m4a", audio, RATE, "aac")
    write_av(tmp_path / "a.mp4", audio, RATE, "aac", picture=True)
    for name in ("a.mp3", "a.m4a", "a.mp4"):
        loaded, rate = load_audio(tmp_path / name)
        assert rate == RATE and loaded.shape[0] == 1
        assert abs(loaded.shape[1] - RATE) < 3000  # Coders add a frame or two.
        spectrum = torch.fft.rfft(loaded[0, :RATE] * torch.hann_window(loaded[0, :RATE].numel()))
        assert abs(int(spectrum.abs().argmax()) - 440) <= 1
        assert loaded.square().mean().sqrt() == pytest.approx(0.5 / 2**0.5, rel=0.1)


def test_files_that_hold_no_sound(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    (tmp_path / "picture.wav").write_bytes((tmp_path / "picture.png").read_bytes())
    write_av(tmp_path / "silent.mp4", None, RATE, "aac", picture=True)
    (tmp_path / "text.wav").write_text("hello " * 1000)
    (tmp_path / "empty.wav").touch()
    (tmp_path / "list.m3u8").write_text(
        "#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n"
    )
    faults = {
        "picture.wav": "not a WAV",
        "silent.mp4": "no sound track",
        "text.wav": "not a WAV",
        "empty.wav": "not a WAV",
        "list.m3u8": "not a WAV",
        "none.wav": "no such file",
        ".": "folder",
    }
    for name, reason in faults.items():
        with pytest.raises(InputError, match=reason):
            load_audio(tmp_path / name)
    with pytest.raises(InputError, match="addresses"):
        load_audio("https://example.org/a.wav")
    with pytest.raises(InputError, match="no samples"):
        load_audio(float_wav(np.zeros(0, np.float32)))


def test_damaged_files_are_read_as_far_as_they_go_or_refused(tmp_path):
    for suffix in (".wav", ".flac", ".ogg", ".opus"):
        path = tmp_path / f"a{suffix}"
        noise = torch.rand(1, RATE, generator=torch.Generator().manual_seed(0)) - 0.5
        save_audio(noise, RATE, path)
        data = path.read_bytes()
        for cut in (10, 60, len(data) // 2, len(data) - 3):
            try:
                audio, _ = load_audio(data[:cut])
            except InputError:
                continue
            assert 1 <= audio.shape[1] <= RATE + 1000 and audio.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_samples_that_are_no_numbers(bad):
    samples = np.zeros(100, np.float32)
    samples[50] = bad
    with pytest.raises(InputError, match="not finite"):
        load_audio(float_wav(samples))


def test_one_sample_silence_many_channels_high_rates():
    audio, rate = load_audio(float_wav(np.array([0.25], np.float32)))
    assert audio.tolist() == [[0.25]] and rate == RATE
    audio, _ = load_audio(float_wav(np.zeros(100, np.float32)))
    assert not audio.any()
    eight = np.tile(np.arange(8, dtype=np.float32) / 8, (100, 1))
    audio, _ = load_audio(float_wav(eight))
    assert audio.shape == (8, 100)
    audio, _ = load_audio(float_wav(eight), mono=True)
    assert torch.allclose(audio, torch.full((1, 100), 3.5 / 8))
    audio, rate = load_audio(float_wav(tone(0.1, 192_000)[0].numpy(), 192_000), sample_rate=RATE)
    assert rate == RATE and audio.shape == (1, 2400)
    inner = slice(100, -100)
    assert torch.allclose(audio[:, inner], tone(0.1)[:, inner], atol=1e-3)
    with pytest.raises(InputError, match=f"{MAX_CHANNELS + 1} channels"):
        load_audio(float_wav(np.zeros((10, MAX_CHANNELS + 1), np.float32)))
    with pytest.raises(InputError, match="100 Hz"):
        load_audio(float_wav(np.zeros(10, np.float32), 100))


def test_louder_than_full_scale_is_scaled_down():
    audio, _ = load_audio(float_wav(np.array([0.0, 4.0, -2.0], np.float32)))
    assert audio.tolist() == [[0.0, 1.0, -0.5]]


def test_too_long_is_refused_whatever_the_header_says(tmp_path):
    save_audio(tone(1.0), RATE, tmp_path / "a.flac")
    write_av(tmp_path / "a.m4a", tone(1.0), RATE, "aac")
    for name in ("a.flac", "a.m4a"):
        with pytest.raises(InputError, match=r"longer than 0.5 seconds"):
            load_audio(tmp_path / name, max_seconds=0.5)
    data = bytearray((tmp_path / "a.flac").read_bytes())
    data[8 + 13] |= 0x0F  # 36 bits of sample count in STREAMINFO: claim two million seconds.
    with pytest.raises(InputError, match="damaged"):
        load_audio(bytes(data))


# --- Channels, rate, level, length ---


def test_to_channels():
    stereo = torch.tensor([[1.0, 0.0], [0.0, 0.5]])
    assert to_channels(stereo, 2) is stereo
    assert to_channels(stereo, 1).tolist() == [[0.5, 0.25]]
    assert to_channels(to_channels(stereo, 1), 2).tolist() == [[0.5, 0.25]] * 2
    assert to_channels(stereo[None], 1).shape == (1, 1, 2)


@pytest.mark.parametrize("samples", [1, 2, 441, 1000])
def test_resample_length_and_a_tone(samples):
    assert resample(torch.zeros(1, samples), 44_100, RATE).shape == (
        1,
        math.ceil(samples * RATE / 44_100),
    )
    up = resample(tone(0.2, 16_000), 16_000, RATE)
    assert torch.allclose(up[:, 200:-200], tone(0.2)[:, 200:-200], atol=2e-3)
    with pytest.raises(InputError, match="sample rate"):
        resample(torch.zeros(1, 4), 0, RATE)


def test_loudness():
    # BS.1770: 997 Hz at full scale in one channel is -3.01 LUFS.
    assert loudness(tone(1.0, 48_000, 997.0, level=1.0), 48_000) == pytest.approx(-3.01, abs=0.05)
    assert loudness(torch.zeros(1, RATE), RATE) == -math.inf
    assert loudness(torch.zeros(1, 1), RATE) == -math.inf
    assert loudness(tone(0.1), RATE) == pytest.approx(loudness(tone(1.0), RATE), abs=0.5)
    assert math.isfinite(loudness(tone(0.5, channels=8), RATE))
    quiet = normalize_loudness(tone(1.0), RATE, -30.0)
    assert loudness(quiet, RATE) == pytest.approx(-30.0, abs=0.1)
    assert normalize_loudness(tone(1.0), RATE, 0.0).abs().max() == pytest.approx(10 ** (-1 / 20))
    assert not normalize_loudness(torch.zeros(1, RATE), RATE).any()
    assert normalize_peak(tone(), -6.0).abs().max() == pytest.approx(10 ** (-6 / 20))
    assert not normalize_peak(torch.zeros(1, 8)).any()


def test_trim_silence():
    audio = torch.cat([torch.zeros(1, RATE), tone(0.5), torch.zeros(1, RATE // 2)], dim=1)
    trimmed = trim_silence(audio, RATE, margin=0.02)
    assert trimmed.shape[1] == pytest.approx(0.54 * RATE, abs=240)
    assert trimmed.square().sum() == pytest.approx(float(audio.square().sum()))
    assert torch.equal(trim_silence(torch.zeros(1, 99), RATE), torch.zeros(1, 99))
    assert trim_silence(torch.ones(1, 1), RATE).shape == (1, 1)


def test_ragged_batches_and_crops():
    recordings = [torch.full((1, n), float(n)) for n in (3, 7, 1)]
    batch, lengths = pad_batch(recordings, multiple=4)
    assert batch.shape == (3, 1, 8) and lengths.tolist() == [3, 7, 1]
    assert not batch[2, :, 1:].any()
    for a, b in zip(unpad_batch(batch, lengths), recordings, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(InputError, match="channels"):
        pad_batch([torch.zeros(1, 2), torch.zeros(2, 2)])

    ramp = torch.arange(100.0)[None]
    starts = {int(random_crop(ramp, 10, random.Random(seed))[0, 0]) for seed in range(40)}
    assert len(starts) > 15 and min(starts) >= 0 and max(starts) <= 90
    crop = random_crop(ramp, 10, random.Random(3))
    assert torch.equal(crop, crop[:, :1] + torch.arange(10.0))
    assert random_crop(torch.tensor([[1.0, 2.0]]), 5, random.Random(0)).tolist() == [
        [1, 2, 1, 2, 1]
    ]


def test_log_mel_shape_and_peak():
    mel = log_mel(tone(1.0, hertz=1000.0), RATE)
    assert mel.shape == (1, 100, 1 + RATE // 256)
    # HTK: 100 triangles with equally spaced middles from 0 to 12 kHz.
    middle = 2595 * math.log10(1 + 1000 / 700) / (2595 * math.log10(1 + 12_000 / 700)) * 101 - 1
    assert abs(int(mel[0, :, 40].argmax()) - middle) <= 1
    assert log_mel(torch.zeros(1, RATE), RATE).max() == pytest.approx(math.log(1e-7))


# --- Writing ---


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".opus"])
def test_records_travel_in_the_file(tmp_path, record, suffix):
    path = tmp_path / f"a{suffix}"
    save_audio(tone(), RATE, path, record)
    assert read_record(path) == record
    assert load_audio(path)[0].shape == (1, RATE // 2)
    save_audio(tone(), RATE, path)
    assert read_record(path) is None
    with pytest.raises(InputError, match="exists already"):
        save_audio(tone(), RATE, path, overwrite=False)


def test_wav_stays_a_sound_riff_file(tmp_path, record):
    path = tmp_path / "a.wav"
    save_audio(tone(), RATE, path, record)
    data = path.read_bytes()
    assert struct.unpack("<I", data[4:8])[0] == len(data) - 8
    assert soundfile.info(path).frames == RATE // 2
    with av.open(str(path)) as container:
        assert '"prompt":"Grüße' in container.metadata["comment"]
    # Damage never raises.
    for place in (16, 40, len(data) - 20, len(data) - 9000):
        path.write_bytes(data[:place] + b"\xff\xff\xff\x7f" + data[place + 4 :])
        try:
            assert read_record(path) in (None, record)
        except InputError as error:
            assert "not a recording" in str(error)


def test_writing_piece_by_piece(tmp_path):
    audio = tone(3.0)
    with write_audio(tmp_path / "a.flac", RATE) as writer:
        for start in range(0, audio.shape[1], 7000):
            writer.write(audio[:, start : start + 7000])
    save_audio(audio, RATE, tmp_path / "b.flac")
    pieces, whole = load_audio(tmp_path / "a.flac")[0], load_audio(tmp_path / "b.flac")[0]
    assert torch.equal(pieces, whole)


def test_long_vorbis(tmp_path):
    # One long write crashes libsndfile.
    save_audio(tone(30.0, channels=2), RATE, tmp_path / "a.ogg")
    assert load_audio(tmp_path / "a.ogg")[0].shape == (2, 30 * RATE)


def test_opus_of_another_rate(tmp_path):
    save_audio(tone(0.5, 22_050), 22_050, tmp_path / "a.opus")
    audio, rate = load_audio(tmp_path / "a.opus")
    assert rate == 24_000 and audio.shape == (1, 12_000)


def test_opus_of_ffmpeg_begins_where_the_sound_begins(tmp_path):
    """Not earlier by what the encoder asks to leave out, with a jump after the first block read."""
    audio = tone(1.0, 48_000, 300.0) * torch.linspace(0, 1, 48_000)
    write_av(tmp_path / "a.opus", audio, 48_000, "libopus")
    loaded = load_audio(tmp_path / "a.opus")[0][:, :48_000]
    assert float((loaded - audio)[:, 500:].abs().max()) < 0.05


def test_refused_writes_leave_nothing(tmp_path, record):
    refusals = [
        (lambda: save_audio(tone(), RATE, tmp_path / "a.mp3"), "must end in"),
        (lambda: save_audio(torch.zeros(1, 0), RATE, tmp_path / "a.wav"), "no samples"),
        (lambda: save_audio(torch.zeros(8), RATE, tmp_path / "a.wav"), "shape"),
        (lambda: save_audio(torch.full((1, 9), math.nan), RATE, tmp_path / "a.wav"), "not finite"),
        (lambda: save_audio(torch.zeros(20, 9), RATE, tmp_path / "a.flac"), "cannot hold 20"),
        (lambda: save_audio(tone(), RATE, tmp_path / "none" / "a.wav"), "does not exist"),
        (
            lambda: save_audio(
                tone(), RATE, tmp_path / "a.opus", {**record, "prompt": "x" * 46_000}
            ),
            "Opus",
        ),
    ]
    for refused, reason in refusals:
        with pytest.raises(InputError, match=reason):
            refused()
    assert not list(tmp_path.iterdir())


def test_a_broken_disk_raises_oserror_and_leaves_nothing(tmp_path, monkeypatch):
    def full(self, data):
        raise soundfile.LibsndfileError(2)

    monkeypatch.setattr(soundfile.SoundFile, "write", full)
    with pytest.raises(OSError, match="disk"):
        save_audio(tone(), RATE, tmp_path / "a.wav")
    assert not list(tmp_path.iterdir())


# --- Pictures ---


def test_pictures(tmp_path):
    audio = torch.cat([torch.zeros(1, RATE), tone(1.0, hertz=4000.0)], dim=1)
    wave = waveform_image(audio, RATE, 400, 120)
    assert wave.size == (400, 120) and wave.mode == "RGB"
    pixels = np.asarray(wave).astype(int)
    blue = (pixels[..., 2] - pixels[..., 0]) > 60
    # Silence left (a line in the middle), sound right.
    assert not blue[20:44, 44:210].any() and blue[20:80, 225:380].mean() > 0.4

    picture = spectrogram_image(audio, RATE, 400, 200)
    pixels = np.asarray(picture).astype(int).sum(-1)
    plot = pixels[8:176, 44:388]
    assert plot[:, :150].max() < 120  # Black while silent.
    row = int(plot[:, 200:320].mean(1).argmax()) / plot.shape[0]
    expected = 1 - math.log10(1 + 4000 / 700) / math.log10(1 + 12_000 / 700)
    assert row == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(
    "audio, rate",
    [
        (torch.ones(1, 1), 24_000),
        (torch.zeros(2, 500), 8_000),
        (torch.ones(8, 3000) * 0.1, 192_000),
        (torch.zeros(1, 100_000), 1_000),
    ],
    ids=["one-sample", "silence", "192kHz", "1kHz"],
)
def test_pictures_of_odd_recordings(audio, rate):
    for draw in (waveform_image, spectrogram_image):
        assert draw(audio, rate).size[0] == 800
        with pytest.raises(InputError, match="samples"):
            draw(audio[:, :0], rate)
    with pytest.raises(InputError, match="60 pixels"):
        waveform_image(audio, rate, 40, 30)


def test_no_file_is_opened_twice_or_left_open(tmp_path):
    save_audio(tone(), RATE, tmp_path / "a.wav")
    file = open(tmp_path / "a.wav", "rb")  # noqa: SIM115
    load_audio(file)
    assert not file.closed
    file.close()
    Path(tmp_path / "a.wav").unlink()
