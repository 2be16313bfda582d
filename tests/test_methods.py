"""Methods do what they say."""

from spd_lens import methods


def test_all_methods_are_found_the_paper_first():
    found = methods.names()
    assert found[:5] == ["base", "psr", "spd", "ssd", "ssd-config"]
    assert {"spd-random", "spd-random-kl", "spd-random-energy", "spd-shuffled", "spd-complement"} < set(found)
