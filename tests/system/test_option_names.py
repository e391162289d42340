"""Messages that name parameters of Python, rewritten to name options of a command."""

from __future__ import annotations

from cloudrt.system.option_names import with_options


def test_only_options_of_the_command_are_replaced() -> None:
    text = "`a=True` or `b_c='x'` in /d=1/`: `unknown=2`, `e`"
    assert with_options(text, {"--a", "--b-c", "--d", "--e"}) == "--a or --b-c x in /d=1/`: `unknown=2`, --e"
