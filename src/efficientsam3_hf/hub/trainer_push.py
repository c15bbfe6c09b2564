"""What transformers' `Trainer` leaves out when it pushes in the middle of training."""

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..models.auto_map import copy_code


class PushCodeCallback(TrainerCallback):
    """Lets every state that a `Trainer` pushes load with `trust_remote_code=True`.

    A push from a checkpoint takes configuration, weights and processor out of it, but no code, to
    which the configuration refers. With this callback among the trainer's, the code is there first:

    ```python
    Trainer(model, args, callbacks=[PushCodeCallback()], ...)
    ```
    """

    def on_push_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs,
    ) -> None:
        """Write the code where `Trainer` is about to push from."""
        if args.should_save and args.output_dir is not None:
            copy_code(args.output_dir)
