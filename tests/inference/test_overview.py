"""index.html over the photos of a run."""

from segdiff_jax.inference import overview

SETTINGS = {"steps": 4, "ensemble": 1, "shortlist": 0, "tiles": 0, "seed": 0, "threshold": 0.5}


def test_the_note_leaves_out_what_is_switched_off():
    said = overview.note("runs/a", SETTINGS | {"closed": False})
    assert said == "runs/a: steps 4, ensemble 1, seed 0, threshold 0.5"
    said = overview.note("demo", SETTINGS | {"tiles": 3, "closed": True})
    assert "tiles 3, seed 0" in said and "every pixel has a class" in said and "0.5" not in said
