"""The promotion gate as a Kubeflow component."""

from kfp import dsl

from components.images import TARGET


@dsl.component(base_image=TARGET, install_kfp_package=False)
def promote(
    target: str,
    store: str,
    run_id: str,
    gpus: str,
    run: dsl.Input[dsl.Artifact],
    dataset: dsl.Input[dsl.Dataset],
    registered: dsl.Input[dsl.Artifact],
    verdict: dsl.Output[dsl.Markdown],
) -> None:
    """Put what a retraining has registered before the promotion gate, on the device that it is for.

    A challenger that does not pass is no failure; nor is a gate that cannot decide, which says so.

    Args:
        target: Label of the target.
        store: The stage store.
        run_id: Name of the run in whose records the outcome is written.
        gpus: GPUs that this step was promised; with fewer the gate does not decide.
        run: What open-run found out.
        dataset: Tar of data-prep.
        registered: Tar of register.
        verdict: What the gate says, and why.
    """
    from pathlib import Path

    from components.step import opened
    from yolov8_nas.foreign import markdown
    from yolov8_nas.report.wording import gate
    from yolov8_nas.run.lifecycle import telling
    from yolov8_nas.run.retraining import challenge
    from yolov8_nas.terminal import say

    with telling("promote", store=store, run_id=run_id, target=target):
        known = opened(run)
        said = challenge(
            store=store,
            run_id=run_id,
            label=target,
            gpus=int(gpus),
            tracking_uri=known["tracking_uri"],
            tolerance=known["retraining"]["tolerance"],
            registered=Path(registered.path),
            dataset=Path(dataset.path),
        )
    say(gate(said))
    Path(verdict.path).write_text(f"# {markdown(target)}\n\n{markdown(gate(said))}\n")
