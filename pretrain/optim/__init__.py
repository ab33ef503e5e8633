"""Update rules, learning-rate schedules, and the backends that apply them."""
