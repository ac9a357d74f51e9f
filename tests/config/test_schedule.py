import numpy as np
import pytest
from conftest import TINY

from clipfh.config import presets
from clipfh.config.schedule import make_schedule


@pytest.mark.parametrize("views", [2, 3, 5, 7])
@pytest.mark.parametrize("every", [0, 50, 64, 1000])
def test_reports_come_at_the_same_images_for_every_batch(views, every):
    experiment = presets.resolve(
        "image", None, {**TINY, "batch.views": views, "budget.images": 600, "budget.report_every": every}
    )
    schedule, batch = make_schedule(experiment, 100, 0), 8 * views
    seen = [step * batch for step in range(1, schedule.num_steps + 1) if schedule.is_report(step)]
    asked = [image for image in np.arange(1, 600) if image % (every or 60) == 0]
    assert seen == sorted({*(-(-int(image) // batch) * batch for image in asked), schedule.num_steps * batch})
    assert 600 <= schedule.num_steps * batch < 600 + batch


def test_budget_in_epochs():
    in_epochs = presets.resolve("image", None, {**TINY, "budget.epochs": 2.0, "budget.images": 0})
    assert make_schedule(in_epochs, 100, 0).num_steps == 13
    assert make_schedule(in_epochs, 100, 20).num_steps == 10, "single photos, which none of its terms take"
