"""What is known of a student that lies on the Hub goes into the record of its next stage."""

from distillation.worlds import image_trainer

from efficientsam3_hf.hub.results import (
    TRAINING_FILE,
    TrainingRecord,
    read_training,
    write_training,
)


def test_earlier_stages_of_a_student_on_the_hub_are_told_on(hub, tmp_path):
    first = TrainingRecord(
        stage="stage 1: images",
        teacher="facebook/sam3",
        datasets=["sa1b"],
        command="train_distill.py",
        steps=5,
        hardware="1 x cpu",
        initial_weights={"student": "teacher"},
    )
    write_training([first], tmp_path)
    hub.put("owner/student", {TRAINING_FILE: (tmp_path / TRAINING_FILE).read_bytes()})
    hub.put("owner/unrecorded", {"config.json": b"{}"})
    records = {}
    for name in ("owner/student", "owner/unrecorded"):
        trainer = image_trainer(tmp_path / name)
        trainer.parent = name

        trainer.save_model()

        records[name] = read_training(tmp_path / name)

    assert records["owner/student"][:-1] == [first]
    assert [each[-1].initial_weights["student"] for each in records.values()] == list(records)
    assert len(records["owner/unrecorded"]) == 1
