"""Train a student by a stage of distillation.

    accelerate launch examples/train_distill.py --config examples/configs/stage1_text.yaml
    accelerate launch examples/train_distill.py --config FILE --training.learning_rate 1e-3
    accelerate launch examples/train_distill.py --config FILE --training.resume_from_checkpoint true
    python examples/train_distill.py --help --stage stage1_image

A configuration is a YAML file with the sections `stage`, `student`, `teacher`, `data`, `training`,
and `clips` for a stage of both images and clips. Each of their settings can be given as a flag,
too, which goes before the file's: --SECTION.FIELD VALUE. What is wrong with settings is said in a
line; --debug shows where in the code it was found.
"""

import argparse

from efficientsam3_hf.distillation.launch import explain, prepare


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        usage="%(prog)s --config FILE [--stage STAGE] [--SECTION.FIELD VALUE ...] [--debug]"
        " | --help",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config")
    parser.add_argument("--stage")
    parser.add_argument("--debug", action="store_true")
    parser.add_argument("--help", "-h", action="store_true")
    options, flags = parser.parse_known_args(arguments)
    try:
        if options.help:
            print(f"{__doc__}\n{explain(options.stage)}")
            return
        if options.stage is not None:
            flags += ["--stage", options.stage]
        run = prepare(options.config, flags)
        _ = run.trainer  # student, teacher and data, which settings may name wrongly
    except (ValueError, OSError, ImportError) as error:
        if options.debug:
            raise
        parser.error(str(error))
    run.train()


if __name__ == "__main__":
    main()
