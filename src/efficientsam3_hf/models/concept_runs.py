"""Concepts through all frames of a video, or of a stream, with results that come late."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel

from .concept_session import EfficientSam3ConceptSession, EfficientSam3VideoOutput
from .configuration_efficientsam3_video import EfficientSam3VideoConfig
from .processing_efficientsam3_video import EfficientSam3VideoProcessor, FrameMasklets


class ConceptRuns(PreTrainedModel):
    """Gives a model that follows concepts into one frame the way through many.

    What is waiting for confirmation lies in the session, so that a run can be left at any result
    and be taken up again.
    """

    config: EfficientSam3VideoConfig

    def propagate_in_video_iterator(
        self,
        inference_session: EfficientSam3ConceptSession,
        start_frame_idx: int = 0,
        max_frame_num_to_track: int | None = None,
        reverse: bool = False,
        show_progress_bar: bool = False,
        resume: bool = False,
    ) -> Iterator[EfficientSam3VideoOutput]:
        """Find and follow all concepts from frame to frame, in one direction.

        Results come `hotstart_delay` frames late, when it is known which objects are none.

        Args:
            inference_session: One with a whole video.
            start_frame_idx: Where to start.
            max_frame_num_to_track: How many frames to go from there; None for all there are.
            reverse: Whether to go backward.
            show_progress_bar: Whether to show one.
            resume: Whether to go on where the last call was left, as its arguments said, in place
                of starting.
        """
        session = inference_session
        if session.tracker.is_streaming:
            raise ValueError("A stream has no end: call the model with one frame after another.")
        if not resume:
            length = session.num_frames
            distance = length if max_frame_num_to_track is None else max_frame_num_to_track
            if reverse:
                order = range(start_frame_idx, max(start_frame_idx - distance, 0) - 1, -1)
            else:
                order = range(start_frame_idx, min(start_frame_idx + distance, length - 1) + 1)
            session.begin_run(order)
        if session.ahead is None:
            raise ValueError("There is nothing to resume: this session has not been started.")
        is_backward = session.ahead.step < 0
        for _ in tqdm(session.ahead, desc="tracking", disable=not show_progress_bar):
            output = self(session, frame_idx=session.ahead[0], reverse=is_backward)
            session.ahead = session.ahead[1:]
            yield from self.release(session, output, self.config.hotstart_delay)
        while session.pending:
            yield session.pending.pop(0)

    def release(
        self, session: EfficientSam3ConceptSession, output: EfficientSam3VideoOutput, delay: int
    ) -> Iterator[EfficientSam3VideoOutput]:
        """Put an output at the end of the queue, and give those that have waited long enough."""
        session.pending.append(output)
        for earlier in session.pending:
            earlier.learn(output, self.config.hotstart_delay)
        while len(session.pending) >= max(delay, 1):
            yield session.pending.pop(0)

    def stream(
        self,
        frames: Iterable[Any],
        text: str | Sequence[str] | None = None,
        input_boxes: Sequence[Sequence[float]] | None = None,
        input_boxes_labels: Sequence[int] | None = None,
        processor: EfficientSam3VideoProcessor | None = None,
        delay: int | None = None,
        session: EfficientSam3ConceptSession | None = None,
    ) -> Iterator[FrameMasklets]:
        """Find and follow concepts in frames as they come: of a file, a camera, a list.

        Memory does not grow with the number of frames.

        Args:
            frames: Pictures of any kind that the image processor takes, or objects that have one as
                `pixels` and its number as `index`.
            text: A phrase, or several.
            input_boxes: Exemplars (x1, y1, x2, y2) in the first frame of the session, with one
                phrase or none.
            input_boxes_labels: 1 for "like this", 0 for "unlike this"; all 1 if left out.
            processor: None for the one beside the model's weights.
            delay: By how many frames results come late; None for `hotstart_delay`, within which
                objects turn out to be none. With 0 they come at once, and `is_confirmed` tells.
            session: One to go on with, as it was left or saved; None for a new one. What it looks
                for already may be said again.
        """
        processor = processor or self.own_processor()
        if session is None:
            session = processor.init_video_session(inference_device=self.device, dtype=self.dtype)
        phrases = [text] if isinstance(text, str) else list(text or [])
        if input_boxes is None:
            processor.add_text_prompt(session, phrases)
        elif len(phrases) > 1:
            raise ValueError("Exemplars go with one phrase or none. Add others to a session.")
        if input_boxes is None and not session.prompts:
            raise ValueError("There is nothing to look for: give text or input_boxes.")
        delay = self.config.hotstart_delay if delay is None else delay
        for frame in frames:
            is_numbered = hasattr(frame, "pixels")
            picture = processor.open_frame(frame.pixels if is_numbered else frame)
            frame_idx = processor.add_frame(session, picture)
            session.source_frame = frame.index if is_numbered else frame_idx
            if input_boxes is not None:
                phrase = phrases[0] if phrases else None
                processor.add_exemplars(session, 0, input_boxes, input_boxes_labels, phrase)
                input_boxes = None
            output = self(session, frame_idx=frame_idx)
            output.source_frame = session.source_frame
            output.pixels = processor.to_pixels(picture)
            for ready in self.release(session, output, delay):
                yield processor.post_process_frame(session, ready)
        if session.num_frames == 0:
            raise ValueError("There are no frames to follow anything in.")
        while session.pending:
            yield processor.post_process_frame(session, session.pending.pop(0))

    def own_processor(self) -> EfficientSam3VideoProcessor:
        """The processor in the folder that the model was loaded from."""
        if not self.name_or_path:
            raise ValueError("This model was not loaded from a folder: pass processor=...")
        return EfficientSam3VideoProcessor.from_pretrained(self.name_or_path)
