"""Reward functions that tests name by their import path."""


def letters(completion, example):
    """The share of letters that the solution has too."""
    return sum(letter in example["solution"] for letter in completion) / max(len(completion), 1)
