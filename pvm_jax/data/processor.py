"""Chat messages with images and videos -> the arrays that Hugging Face's Qwen3VLProcessor gives,
without torch.

The checkpoint's own tokenizer and chat template decide the text, `pvm_jax.data.patches` the pixels.
"""

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, cast

import numpy as np
from numpy.typing import ArrayLike
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from pvm_jax.data.boxes import touched
from pvm_jax.data.chat_template import ChatTemplate, Segment, check_border
from pvm_jax.data.example import Example
from pvm_jax.data.image_files import image_size, read_image
from pvm_jax.data.messages import Conversation, Messages, naming, parse
from pvm_jax.data.patches import Grid, ImageSettings, VideoSettings, patches
from pvm_jax.data.pixels import as_floats
from pvm_jax.data.side_files import check_fits, pixel_settings, read_stop_tokens, visual_tokens
from pvm_jax.data.tags import with_tags_as_text
from pvm_jax.data.tokenizer import read_chat_template, read_tokenizer
from pvm_jax.data.video_files import Outline, VideoFile, decoded, moments, outline
from pvm_jax.files.paths import any_path

CONTENT_TOKENS = tuple(
    f"<|{kind}_{end}|>" for kind in ("object_ref", "box", "quad") for end in ("start", "end")
)
"""Special tokens with which answers mark what they speak of: a text may hold them."""

_WRITTEN = "\0"
"""Stands for an assistant turn's text, where the template puts it."""


class Processor:
    """Turns conversations into model inputs.

    A conversation is a list of messages {"role": …, "content": …}. Content is a string or a list of
    parts: {"type": "text", "text": …}, {"type": "image", "image": …} (also under "url" or "path")
    and {"type": "video", "video": [frame, …]} with the "fps" of these frames, or "timestamps" in
    seconds, beside it. Images and frames are whatever `images.read_image` takes; all frames of such
    a list are used. Of a file, {"type": "video", "video": path}, as many are taken a second as the
    checkpoint says, or as "fps" beside it does; or "num_frames" in all.

    Attributes:
        tokenizer: the checkpoint's tokenizer.
        image_settings, video_settings: how pixels are prepared.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str,
        image_settings: ImageSettings,
        video_settings: VideoSettings,
        control_tokens: Sequence[str] = (),
    ):
        """Raises ValueError if the tokenizer lacks one of the visual tokens.

        Args:
            control_tokens: what no text may hold besides the tokenizer's own special tokens.
        """
        self.tokenizer = tokenizer
        self.image_settings = image_settings
        self.video_settings = video_settings
        visual = visual_tokens(tokenizer)
        added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
        for token in visual:
            if token not in added:
                raise ValueError(f"the tokenizer has no token {token}: it is not Qwen3-VL's")
        self._image, self._video, self._start, self._end = visual
        self._visual_ids = tokenizer.convert_tokens_to_ids(visual[:2])
        specials = [token for token in added if added[token].special]
        controls = dict.fromkeys([*visual, *specials, *control_tokens])
        for token in (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token):
            controls |= {token: None} if isinstance(token, str) else {}
        self._controls = tuple(token for token in controls if token not in CONTENT_TOKENS)
        tokens = [token for token in self._controls if token in added]
        self._control = re.compile("|".join(map(re.escape, tokens)))
        self._control_ids = tokenizer.convert_tokens_to_ids(tokens)
        self._template = ChatTemplate(tokenizer, chat_template, self._controls)
        # The template writes one run around a video, in whose place each group of frames gets its
        # own: so does the processor that the model was published with (transformers 4.57); from
        # 5.10 on transformers leaves the outer run around them.
        run = re.escape(self._start + self._video + self._end)
        self._placeholder = re.compile(f"{run}|{re.escape(self._video)}|{re.escape(self._image)}")

    @classmethod
    def from_pretrained(cls, path: str | Path, *, tags_as_text: Sequence[str] = ()) -> Self:
        """Reads tokenizer, chat template and preprocessor config from a Hugging Face or converted
        checkpoint directory. No code of the checkpoint's is run.

        Args:
            tags_as_text: added tokens, as "<think>", that texts hold in letters instead
                (`pvm_jax.data.tags`).

        Raises:
            FileNotFoundError: if the directory or one of the files is not there.
            ValueError: naming the file, if one is malformed; for a preprocessor setting that is not
                computed here; for a tokenizer without visual tokens, or with more ids than the
                model has rows; for a tag that is none.
        """
        folder = any_path(path)
        tokenizer = with_tags_as_text(read_tokenizer(folder), tags_as_text)
        stops = [
            tokenizer.added_tokens_decoder.get(token)
            for token in read_stop_tokens(folder, tokenizer)
        ]
        processor = cls(
            tokenizer,
            read_chat_template(folder, tokenizer),
            *pixel_settings(folder),
            control_tokens=[token.content for token in stops if token],
        )
        if (folder / "config.json").exists():
            settings = (processor.image_settings, processor.video_settings)
            check_fits(folder, tokenizer, settings)
        return processor

    def encode(self, messages: Messages, *, add_generation_prompt: bool = False) -> Example:
        """One conversation; `loss_mask` is true on the content of every assistant turn and the
        token that ends it.

        Raises:
            FileNotFoundError, ValueError: for messages or images that cannot be taken, naming them;
                and where the chat template or the tokenizer gives an assistant turn no exact place
                in the text.
        """
        conversation = parse(messages, self._controls)
        return self._example(
            conversation,
            self._template.segments(conversation, add_generation_prompt=add_generation_prompt),
        )

    def encode_next(self, messages: Messages) -> Example:
        """What a model that wrote the last assistant turn reads next: the end of that turn, the
        messages after it with their images, and the prompt for the answer. Without an assistant
        turn: all messages.

        Raises:
            FileNotFoundError, ValueError: as `encode`, and where the chat template does not write
                an assistant turn as given.
        """
        turns = [
            number for number, message in enumerate(messages) if message.get("role") == "assistant"
        ]
        if not turns:
            return self.encode(messages, add_generation_prompt=True)
        known = parse(messages[: turns[-1]], self._controls).messages
        following = parse(messages[turns[-1] + 1 :], (*self._controls, _WRITTEN))
        # The turn itself is left out: tokenizing its text anew need not give the tokens that were
        # written.
        written = {"role": "assistant", "content": _WRITTEN}
        whole = replace(following, messages=[*known, written, *following.messages])
        text = self._template.render(whole, add_generation_prompt=True)
        _, found, text = text.rpartition(_WRITTEN)
        if not found:
            raise ValueError(
                "the chat template does not write an assistant turn as it is given: chat with"
                " another template"
            )
        return self._example(following, [(text, False)])

    def __call__(
        self,
        conversations: Sequence[Messages],
        *,
        add_generation_prompt: bool = True,
        padding_side: Literal["left", "right"] = "left",
    ) -> dict[str, np.ndarray]:
        """A padded batch with the keys of Hugging Face's processor.

        Returns:
            input_ids, attention_mask [B, S] int64; where there are images, pixel_values [P,
            patch_dim] float32 and image_grid_thw [images, 3] int64; where there are videos,
            pixel_values_videos and video_grid_thw.

        Raises:
            FileNotFoundError, ValueError: for messages or images that cannot be taken, naming them.
        """
        if len(conversations) == 0 or not isinstance(conversations[0], list | tuple):
            raise ValueError("give a list of conversations, each of them a list of messages")
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
        examples = []
        for number, messages in enumerate(conversations):
            with naming(f"conversation {number}"):
                conversation = parse(messages, self._controls)
                text = self._template.render(
                    conversation, add_generation_prompt=add_generation_prompt
                )
                examples.append(self._example(conversation, [(text, False)]))
        arrays = self._pad([example.input_ids for example in examples], padding_side)
        for key in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
            found = [value for example in examples if (value := getattr(example, key)) is not None]
            if found:
                arrays[key] = np.concatenate(found)
        for key, settings in (
            ("pixel_values", self.image_settings),
            ("pixel_values_videos", self.video_settings),
        ):
            if key in arrays:
                arrays[key] = as_floats(arrays[key], settings.scale, settings.patch_dim)
        return arrays

    def count(self, messages: Messages, *, add_generation_prompt: bool = False) -> tuple[int, int]:
        """Tokens and patches that `encode` would give, from headers alone: no pixels are decoded.

        Raises:
            FileNotFoundError, ValueError: as `encode`, as far as the headers tell.
        """
        conversation = parse(messages, self._controls)
        image_grids, video_grids, seconds = [], [], []
        for where, source in conversation.images:
            with naming(where):
                image_grids.append(self.image_settings.grid(1, *image_size(source)))
        for where, video in conversation.videos:
            with naming(where):
                if isinstance(video, VideoFile):
                    shown = outline(video, self.video_settings.sampling)
                else:
                    shown = Outline(*image_size(video.frames[0]), list(video.seconds))
                size = shown.height, shown.width
                video_grids.append(self.video_settings.grid(len(shown.seconds), *size))
                seconds.append(shown.seconds)
        segments = self._template.segments(
            conversation, add_generation_prompt=add_generation_prompt
        )
        ids, _ = self._tokens(segments, conversation, image_grids, video_grids, seconds)
        return len(ids), sum(math.prod(grid) for grid in image_grids + video_grids)

    @property
    def chat_template(self) -> str:
        """The checkpoint's Jinja template."""
        return self._template.source

    @cached_property
    def fingerprint(self) -> str:
        """Differs between two processors that could give a conversation different numbers of tokens
        or patches."""
        tokenizer: Any = self.tokenizer  # a fast one: transformers 5 has no others for this model
        parts = (
            tokenizer.backend_tokenizer.to_str(),
            self.chat_template,
            repr(self.image_settings),
            repr(self.video_settings),
        )
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def decode(self, ids: ArrayLike, *, skip_special_tokens: bool = True) -> str:
        """The text of token ids [S]."""
        ids = np.asarray(ids, int)
        return str(self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))

    def decoder(self) -> Callable[[int], str]:
        """Token id -> the text that it adds to what came before; nothing while a character's last
        bytes are to come."""
        stream = DecodeStream(skip_special_tokens=True)
        tokenizer = cast(Tokenizer, self.tokenizer.backend_tokenizer)
        return lambda token: stream.step(tokenizer, token) or ""

    def _example(self, conversation: Conversation, segments: list[Segment]) -> Example:
        image_pixels, image_grids, video_pixels, video_grids, marks = [], [], [], [], []
        seconds = []
        merge = self.image_settings.merge_size
        for (where, source), boxes in zip(conversation.images, conversation.boxes, strict=True):
            with naming(where):
                image = read_image(source)
                pixels, grid = patches([image], self.image_settings)
                marks.append(touched(boxes, *image.size, grid[1] // merge, grid[2] // merge))
            image_pixels.append(pixels)
            image_grids.append(grid)
        for where, video in conversation.videos:
            with naming(where):
                if isinstance(video, VideoFile):
                    video = decoded(video, self.video_settings.sampling)
                pixels, grid = patches(
                    [read_image(frame) for frame in video.frames], self.video_settings
                )
            seconds.append(video.seconds)
            video_pixels.append(pixels)
            video_grids.append(grid)
        ids, mask = self._tokens(segments, conversation, image_grids, video_grids, seconds)
        shown = np.flatnonzero(ids == self.tokenizer.convert_tokens_to_ids(self._image))
        return Example(
            input_ids=ids,
            pixel_values=np.concatenate(image_pixels) if image_pixels else None,
            image_grid_thw=np.array(image_grids, np.int64) if image_grids else None,
            pixel_values_videos=np.concatenate(video_pixels) if video_pixels else None,
            video_grid_thw=np.array(video_grids, np.int64) if video_grids else None,
            loss_mask=mask,
            image_scale=self.image_settings.scale if image_pixels else None,
            video_scale=self.video_settings.scale if video_pixels else None,
            evidence=shown[np.concatenate(marks)] if any(conversation.boxes) else None,
        )

    def _tokens(
        self,
        segments: list[Segment],
        conversation: Conversation,
        image_grids: list[Grid],
        video_grids: list[Grid],
        seconds: Sequence[Sequence[float]],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token ids [S] int64 with one placeholder per visual token, and which are learned [S]
        bool. `seconds`: of each video's frames."""
        text = "".join(text for text, _ in segments)
        for kind, token, grids in (
            ("image", self._image, image_grids),
            ("video", self._video, video_grids),
        ):
            if text.count(token) != len(grids):
                raise ValueError(
                    f"the chat template wrote {text.count(token)} placeholders for {len(grids)}"
                    f" {kind}s: does it show the {kind}s of every role?"
                )
        images, videos = iter(image_grids), zip(video_grids, seconds, strict=True)
        lengths: list[int] = []

        def expand(match: re.Match[str]) -> str:
            if match[0] == self._image:
                lengths.append(math.prod(next(images)) // self.image_settings.merge_size**2)
                return self._image
            (groups, rows, columns), taken = next(videos)
            lengths.extend([rows * columns // self.video_settings.merge_size**2] * groups)
            return "".join(
                f"<{moment:.1f} seconds>{self._start}{self._video}{self._end}"
                for moment in moments(taken, self.video_settings.temporal_patch_size)
            )

        segments = [(self._placeholder.sub(expand, text), learned) for text, learned in segments]
        ids, learned = self._tokenize(segments, conversation)
        # A placeholder is a token on its own, so that repeating one is what tokenizing a run of
        # them would give.
        repeats = np.ones(len(ids), np.int64)
        repeats[np.isin(ids, self._visual_ids)] = lengths
        return np.repeat(ids, repeats), np.repeat(learned, repeats)

    def _tokenize(
        self, segments: list[Segment], conversation: Conversation
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the segments, each on its own, and which are learned.

        They are the ids of the whole text, unless a token would span the end of a prompt and what
        the template itself writes before an answer (an empty thought): an answer is learned after
        the ids that ask for it, which is how it will be written.
        """
        pieces = [self._ids(text) for text, _ in segments]
        ids = [token for piece in pieces for token in piece]
        text = "".join(text for text, _ in segments)
        if ids != self._ids(text):
            answers = [m for m in conversation.messages if m["role"] == "assistant"]
            for (asked, _), answer in zip(segments[::2], answers, strict=False):
                check_border(asked, answer["content"])
        if sum(np.isin(ids, self._control_ids)) != len(self._control.findall(text)):
            raise ValueError(
                "the tokenizer makes a control token of what is none in the text: write it in"
                " another way"
            )
        learned = np.repeat([mark for _, mark in segments], [len(piece) for piece in pieces])
        if np.isin(np.array(ids)[learned.astype(bool)], self._visual_ids).any():
            raise ValueError(
                "an assistant turn with a picture or a video cannot be learned, the model writes"
                ' text alone: mark the turn ("train": false), or show it in a user turn'
            )
        return np.array(ids, np.int64), learned.astype(bool)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _pad(self, rows: list[np.ndarray], side: str) -> dict[str, np.ndarray]:
        pad = self.tokenizer.pad_token_id
        if pad is None:
            raise ValueError("the tokenizer has no pad_token: set it in tokenizer_config.json")
        length = max(map(len, rows))
        ids = np.full((len(rows), length), pad, np.int64)
        mask = np.zeros((len(rows), length), np.int64)
        for number, row in enumerate(rows):
            columns = slice(length - len(row), length) if side == "left" else slice(len(row))
            ids[number, columns] = row
            mask[number, columns] = 1
        return {"input_ids": ids, "attention_mask": mask}
