"""The models of sound that are on this computer, each loaded when it is first asked for."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..modalities.errors import InputError
from ..weights.registry import list_models, model_info, resolve_model

if TYPE_CHECKING:
    from ..pipelines.text_to_sound import TextToSoundPipeline
    from ..pipelines.text_to_speech import TextToSpeechPipeline
    from ..tokenizers.base import AudioTokenizer


class SoundModels:
    """
    Args:
        voice: a model that speaks: a shipped name or a folder.
        sound: one that makes sounds of captions.
    """

    def __init__(self, voice: str = "voice", sound: str = "sound"):
        self.names = {"voice": voice, "sound": sound}
        self._pipelines: dict[str, Any] = {}
        self._codecs: dict[str, AudioTokenizer] = {}
        self._loading = threading.Lock()

    def found(self, kind: str) -> bool:
        """Whether the model of "voice" or "sound" is there."""
        return self._folder(kind) is not None

    def generator_config(self, kind: str) -> dict[str, Any]:
        """The configuration of its generator, read without loading it."""
        path = self._folder(kind) / "generator" / "config.json"
        return json.loads(path.read_text(encoding="utf8"))

    def voice(self) -> TextToSpeechPipeline:
        from .commands_audio import load_voice

        return self._load("voice", load_voice)

    def sound(self) -> TextToSoundPipeline:
        from .commands_audio import load_sound

        return self._load("sound", load_sound)

    def codec_names(self) -> list[str]:
        """Codecs that can be used without a download, those of the models first."""
        from .studio import availability

        names = [Path(self.names[kind]).name for kind in self.names if self.found(kind)]
        for name in list_models(task="audio-tokenizer"):
            if availability(model_info(name)) != "needs download":
                names.append(name)
        return names

    def codec(self, name: str) -> AudioTokenizer:
        """One of `codec_names`; the last one that is no model's own is kept.

        Raises:
            InputError: another name, or it could not be loaded.
        """
        if name not in self.codec_names():
            raise InputError(f'"{name[:80]}" is not on this computer: see the Models tab.')
        for kind, load in (("voice", self.voice), ("sound", self.sound)):
            if self.found(kind) and name == Path(self.names[kind]).name:
                return load().codec
        if name not in self._codecs:
            from .commands_audio_tokens import load_codec

            self._codecs.clear()
            self._codecs[name] = load_codec(name)
        return self._codecs[name]

    def _folder(self, kind: str) -> Path | None:
        try:
            folder = resolve_model(self.names[kind])
        except InputError:
            return None
        return folder if isinstance(folder, Path) else None

    def _load(self, kind: str, load: Any) -> Any:
        with self._loading:
            if kind not in self._pipelines:
                self._pipelines[kind] = load(self.names[kind])
            return self._pipelines[kind]
