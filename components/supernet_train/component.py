"""supernet-train as a Kubeflow component."""

from kfp import dsl

from components.images import TRAINING


@dsl.component(base_image=TRAINING, install_kfp_package=False)
def supernet_train(
    config: str,
    store: str,
    run_id: str,
    gpus: str,
    found: str,
    nodes: str,
    node_gpus: str,
    dataset: dsl.Input[dsl.Dataset],
    supernet: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.Markdown],
) -> None:
    """Train the weight-sharing supernet.

    Args:
        config: Run configuration as JSON.
        store: The stage store.
        run_id: Name of the run in whose records the outcome is written.
        gpus: GPUs that this step was promised; with fewer it does not begin.
        found: Key of the result, where this step has room to read it only; empty where it computes it.
        nodes: Nodes to train on; more than one are those of a TrainJob that this step makes.
        node_gpus: GPUs of each of them.
        dataset: Tar of data-prep.
        supernet: Tar of the result, its SHA-256 in the metadata.
        metrics: Figures of the result.
        report: A page on the result.
    """
    from functools import partial

    from components.placement import over_nodes
    from components.step import run_step

    run = None
    if int(nodes) > 1:
        from components.supernet_train.trainjob import run_on_nodes

        run = partial(run_on_nodes, nodes=int(nodes), gpus=int(node_gpus), run_id=run_id)
    run_step(
        "supernet-train",
        config=over_nodes(config, int(nodes), int(node_gpus)),
        target=None,
        store=store,
        run_id=run_id,
        gpus=gpus,
        found=found,
        run=run,
        inputs={"data-prep": dataset},
        output=supernet,
        metrics=metrics,
        report=report,
    )
