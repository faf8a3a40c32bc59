from minigpt_cli.core.environment import environment_changes, training_environment


def test_changes_of_the_environment():
    now = training_environment(
        device="A", device_type="cpu", computing_dtype="float32", ranks=2, strategy="ddp"
    )
    assert environment_changes(now, now) == []
    assert environment_changes(now | {"platform": "another"}, now) == []
    before = now | {"ranks": 4, "device": "B"}
    assert environment_changes(before, now) == [
        "device changed from B to A",
        "ranks changed from 4 to 2",
    ]
