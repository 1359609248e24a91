"""When validation runs, and what exact match counts."""

import pytest

from ftlab.training.evaluate import EvaluationConfig, Evaluator, exact_match, final_number


def evaluator(**given):
    settings = {
        "at_start": True,
        "metric": "val/loss",
        "patience": None,
        "every_steps": None,
        "batch_size": 1,
        "max_batches": None,
    }
    config = EvaluationConfig(**settings | {"n_samples": 0, "max_new_tokens": 1} | given)
    return Evaluator(config=config, validation=None, tokenizer=None, end_ids=[], loss=None, on_samples=None)


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({}, [0, 3, 6, 7]),
        ({"at_start": False}, [3, 6, 7]),
        ({"every_steps": 2}, [0, 2, 4, 6, 7]),
        ({"every_steps": 7}, [0, 7]),
        ({"every_steps": 100}, [0, 7]),
    ],
)
def test_evaluation_is_due_at_the_start_at_its_interval_or_epoch_and_once_at_the_end(given, steps):
    due = evaluator(**given).due
    seven_steps_in_epochs_of_three = [s for s in range(8) if due(s, ends_epoch=s % 3 == 0, ends_run=s == 7)]
    assert seven_steps_in_epochs_of_three == steps


def test_exact_match_is_a_share_by_family_and_over_all():
    answers = [("add", True), ("add", False), ("add", True), ("copy", True)]
    samples = [{"family": family, "correct": correct} for family, correct in answers]
    assert exact_match(samples) == {
        "val/exact_match": 0.75,
        "val/exact_match/add": pytest.approx(2 / 3),
        "val/exact_match/copy": 1.0,
    }


def test_samples_without_a_family_have_no_exact_match():
    assert exact_match([{"family": None, "correct": None}]) == {}


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("6 + 6 = <<6+6=12>>12\n#### 12", "12"),
        ("#### 1,200.0", "1200"),
        ("#### $-0.50 each", "-0.5"),
        ("#### 3 and then #### 4.", "4"),
        ("12", None),
        ("#### none", None),
        ("####", None),
        ("#### ,", None),
    ],
)
def test_the_final_number_of_a_worked_answer(answer, number):
    assert final_number(answer) == number


def test_answers_without_a_family_count_over_all_where_they_were_judged():
    judged = [{"family": None, "correct": correct} for correct in (True, False, None)]
    assert exact_match(judged) == {"val/exact_match": 0.5}
