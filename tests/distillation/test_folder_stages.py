"""What is said in a stage's folder of how far it came."""

import pytest

from efficientsam3_hf.distillation.folder_stages import StageFolder


def test_a_setting_that_is_no_longer_given_is_another_one(tmp_path):
    folder = StageFolder(tmp_path / "stage1_text")
    folder.folder.mkdir()
    folder.begin({"teacher": "a", "parent": "b", "training.learning_rate": "0.5"})

    folder.check({"teacher": "a", "training.learning_rate": "0.5"})

    with pytest.raises(ValueError, match=r"learning_rate: '0\.5' then, 'default' now"):
        folder.check({"teacher": "a"})
