"""What the code needs of other packages' private parts is as it was, and the table lists all of it.

A test that fails here after an upgrade names what has changed and which module of `harness` has to follow.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import inspect
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.architecture.private_parts import ROOT, Row, last_name, private_uses, rows, users_of

TABLE = rows()
MODULES = sorted(path.relative_to(ROOT) for path in (ROOT / "harness").rglob("*.py"))
FUNCTIONS = {
    node.name: ast.unparse(node)
    for node in ast.parse(Path(__file__).read_text()).body
    if isinstance(node, ast.FunctionDef)
}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_every_private_part_that_is_used_is_in_the_table(path: Path) -> None:
    """A new one is added on purpose: with a reason, and with a test of its own below."""
    module = str(path.relative_to("harness"))
    parts = ".".join(part for row in TABLE if module in row.modules for part in row.parts)
    listed = {name.removesuffix("()") for name in parts.split(".")}
    unlisted = private_uses(module, (ROOT / path).read_text()) - listed
    assert not unlisted, f"not in the table of docs/architecture.md under {module}"


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.tests[0])
def test_a_row_of_the_table_is_true(row: Row) -> None:
    texts = {module: (ROOT / "harness" / module).read_text() for module in row.modules}
    names = [last_name(part) for part in row.parts]
    assert [name for name in names if not any(name in text for text in texts.values())] == [], "not used"
    assert [module for module, text in texts.items() if not any(name in text for name in names)] == []
    tested = "".join(FUNCTIONS[test] for test in row.tests)
    assert [name for name in names if name not in tested] == [], f"no test of it in {row.tests}"


def test_the_walk_finds_each_way_to_use_a_private_part() -> None:
    ways = [
        "x._a",
        "self.x._b",
        "getattr(x, '_c', None)",
        "from x import _d",
        "import x._e",
        "from x._f import y",
        "f()._g()",
        "self._own",
        "x._own",
        "super()._h",
        "x.__dict__",
        "x._replace()",
    ]
    text = "\n".join(
        ["class A:", "    def f(self):", "        self._own = 1", *(f"        {way}" for way in ways)]
    )
    assert private_uses("nowhere.py", text) == {"_a", "_b", "_c", "_d", "_e", "_f", "_g"}
    assert private_uses("nowhere.py", "getattr(x, name)") == set()


def has(owner: object, *names: str) -> None:
    for name in names:
        kind = getattr(owner, "__name__", type(owner).__name__)
        assert hasattr(owner, name), f"{kind} has no {name} any more, which {users_of(name)} needs"


@pytest.fixture(scope="module")
def world_of_one() -> Iterator[None]:
    hook = sys.excepthook  # torch puts the rank before what this prints, and leaves that behind
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    sys.excepthook = hook


@pytest.fixture
def parameter() -> nn.Parameter:
    parameter = nn.Parameter(torch.ones(4))
    parameter.grad = torch.ones(4)
    return parameter


@pytest.mark.usefixtures("world_of_one")
def test_fsdp_parameter_groups() -> None:
    model: Any = fully_shard(nn.Linear(2, 2), mesh=init_device_mesh("cpu", (1,)))
    has(model, "_get_fsdp_state")
    state = model._get_fsdp_state()
    has(state, "_fsdp_param_group")
    group = state._fsdp_param_group
    assert getattr(state, "_fsdp_param_groups", [group]) == [group]
    has(group, "fsdp_params", "post_backward", "gradient_divide_factor", "_partial_reduce_output")
    has(group, "_reduce_scatter_comm", "_all_reduce_hook")
    assert hasattr(model, "set_reduce_scatter_unused_params") == hasattr(
        group, "reduce_scatter_unused_params"
    )
    has(group._reduce_scatter_comm, "allocate")
    assert [managed.sharded_param for managed in group.fsdp_params] == list(model.parameters())
    inner, seen = group.post_backward, []

    def post_backward(*unused: Any) -> None:
        for managed in group.fsdp_params:
            has(managed, "_unsharded_param", "unsharded_accumulated_grad", "offload_to_cpu")
            seen.append(managed._unsharded_param.grad is not None)
        inner(*unused)

    group.post_backward = post_backward
    model(torch.ones(1, 2)).sum().backward()
    assert seen[:2] == [True, True], "gradients are no longer in the parameters when post_backward is called"


@pytest.mark.usefixtures("world_of_one")
def test_fsdp_puts_what_is_set_where_it_is_looked_for() -> None:
    model: Any = fully_shard(nn.Linear(2, 2), mesh=init_device_mesh("cpu", (1,)))
    group = model._get_fsdp_state()._fsdp_param_group
    own = type(group._reduce_scatter_comm)()
    model.set_custom_reduce_scatter(own)
    model.set_gradient_divide_factor(3.0)
    model.set_all_reduce_hook(lambda gradient: None)
    assert group._reduce_scatter_comm is own
    assert group.gradient_divide_factor == 3.0
    assert group._all_reduce_hook is not None


@pytest.mark.usefixtures("world_of_one")
def test_device_meshes_are_flattened() -> None:
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicas", "shards"))
    has(mesh, "_flatten")
    assert mesh._flatten().get_group().size() == 1


@pytest.mark.usefixtures("world_of_one")
def test_ddp_says_how_it_reduces() -> None:
    model: Any = DistributedDataParallel(nn.Linear(2, 2))
    has(model, "_comm_hooks", "_delay_all_reduce_params", "_use_python_reducer", "parameters_to_ignore")
    has(model, "_join_config")
    has(model._join_config, "enable", "throw_on_early_termination")
    assert (list(model._delay_all_reduce_params), model._use_python_reducer) == ([], False)
    assert "weight" not in model.parameters_to_ignore

    hook: Any = lambda state, bucket: None  # noqa: E731
    model.register_comm_hook(None, hook)
    assert model._comm_hooks == [(hook, None)]


@pytest.mark.usefixtures("world_of_one")
def test_a_dtensor_keeps_its_part() -> None:
    part = torch.ones(2)
    whole = nn.Parameter(DTensor.from_local(part, init_device_mesh("cpu", (1,))))
    has(whole, "_local_tensor")
    assert whole._local_tensor is whole._local_tensor
    assert whole._local_tensor.data_ptr() == part.data_ptr()


@pytest.mark.usefixtures("world_of_one")
def test_the_default_group_has_a_store() -> None:
    has(dist.distributed_c10d, "_get_default_store")
    store = dist.distributed_c10d._get_default_store()
    store.set("key", "word")
    assert (store.check(["key"]), store.get("key")) == (True, b"word")


def test_nccl_tells_what_it_was_asked_to_do() -> None:
    has(torch._C, "_distributed_c10d")
    assert hasattr(torch._C._distributed_c10d, "_dump_nccl_trace") == dist.is_nccl_available()


def test_functions_say_that_they_are_transformed() -> None:
    def level(x: torch.Tensor) -> torch.Tensor:
        assert torch._C._functorch.peek_interpreter_stack() is not None
        return x.sum()

    torch.func.vmap(level)(torch.ones(2, 3))
    assert torch._C._functorch.peek_interpreter_stack() is None


def test_an_iterator_ends_its_workers() -> None:
    from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

    has(_MultiProcessingDataLoaderIter, "_shutdown_workers")


def test_a_subset_always_fetches_at_once() -> None:
    has(torch.utils.data.Subset, "__getitems__")


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_fused_optimizers_read_the_verdict(kind: Any, parameter: nn.Parameter) -> None:
    optimizer = kind([parameter], lr=1.0, fused=True)
    optimizer.step()
    before = parameter.detach().clone()
    optimizer.found_inf, optimizer.grad_scale = torch.ones(()), torch.ones(())
    optimizer.step()
    assert torch.equal(parameter, before), (
        f"{kind.__name__} steps in spite of found_inf: {users_of('found_inf')}"
    )
    assert parameter.grad is not None
    optimizer.found_inf, optimizer.grad_scale = torch.zeros(()), torch.full((), 2.0)
    optimizer.step()
    assert not torch.equal(parameter, before)
    assert torch.equal(parameter.grad, torch.full((4,), 0.5)), f"grad_scale: {users_of('grad_scale')}"


def test_muons_two_halves_make_its_step() -> None:
    from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

    weight = nn.Parameter(torch.zeros(3, 2))
    weight.grad = torch.arange(6.0).view(3, 2)
    optimizer = torch.optim.Muon([weight], lr=0.5, nesterov=False, momentum=0.0)
    optimizer.step()
    (group,) = optimizer.param_groups
    update = _zeropower_via_newtonschulz(
        weight.grad, group["ns_coefficients"], group["ns_steps"], group["eps"]
    )
    scaled_lr = _adjust_lr(0.5, group["adjust_lr_fn"], weight.shape)
    assert torch.equal(weight, torch.zeros(3, 2).add_(update, alpha=-scaled_lr))


def test_optimizers_keep_their_step_hooks(parameter: nn.Parameter) -> None:
    module = importlib.import_module("torch.optim.optimizer")
    optimizer: Any = torch.optim.SGD([parameter], lr=1.0)
    has(optimizer, "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    has(module, "_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")

    def hook(*unused: Any) -> None: ...

    optimizer.register_step_pre_hook(hook)
    optimizer.register_step_post_hook(hook)
    handles = [
        module.register_optimizer_step_pre_hook(hook),
        module.register_optimizer_step_post_hook(hook),
    ]
    assert list(optimizer._optimizer_step_pre_hooks.values()) == [hook]
    assert list(optimizer._optimizer_step_post_hooks.values()) == [hook]
    assert hook in module._global_optimizer_pre_hooks.values()
    assert hook in module._global_optimizer_post_hooks.values()
    for handle in handles:
        handle.remove()


def test_schedulers_ask_whether_the_optimizer_was_called(parameter: nn.Parameter) -> None:
    optimizer: Any = torch.optim.SGD([parameter], lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    has(optimizer.step, "_wrapped_by_lr_sched")
    optimizer._opt_called = True
    schedule.step()  # a warning would be an error


def test_optimizers_in_the_backward_pass_leave_a_mark(parameter: nn.Parameter) -> None:
    from torch.distributed.optim import _apply_optimizer_in_backward

    _apply_optimizer_in_backward(torch.optim.SGD, [parameter], {"lr": 1.0})
    has(parameter, "_in_backward_optimizers")


def test_accelerates_optimizer_keeps_what_it_wraps() -> None:
    from accelerate import optimizer, state

    has(optimizer, "AcceleratedOptimizer")
    kept = set(optimizer.AcceleratedOptimizer.__init__.__code__.co_names)
    assert {"optimizer", "scaler", "gradient_state"} <= kept, users_of("gradient_state")
    assert "sync_gradients" in state.GradientState.__init__.__code__.co_names, users_of("sync_gradients")


def test_transformers_trainer_clips_and_saves_in_these() -> None:
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    has(transformers.Trainer, "_clip_grad_norm", "_get_grad_norm")
    has(transformers.Trainer, "_save_optimizer_and_scheduler", "_load_optimizer_and_scheduler")
    called = inspect.getsource(transformers.Trainer)
    for name in ("_clip_grad_norm(model)", "_get_grad_norm(model, grad_norm=grad_norm)"):
        assert called.count(f"grad_norm = self.{name}") == 1, users_of("_clip_grad_norm")


def test_lightnings_precision_calls_the_hooks_before_a_step() -> None:
    precision = pytest.importorskip("lightning.pytorch.plugins.precision", reason="pip install lightning")
    has(precision.Precision, "_after_closure")
    assert list(inspect.signature(precision.Precision._after_closure).parameters) == [
        "self",
        "model",
        "optimizer",
    ]


def test_fused_optimizers_say_that_they_divide_by_the_scale() -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    assert torch.optim.AdamW([weight], fused=True)._step_supports_amp_scaling
    assert not getattr(torch.optim.AdamW([weight]), "_step_supports_amp_scaling", False)


def test_foreach_kernels() -> None:
    has(torch, "_foreach_add_", "_foreach_copy_", "_foreach_div_", "_foreach_zero_")
    tensors = [torch.full((2,), 4.0), torch.full((), 8.0)]
    others = [torch.empty(2), torch.empty(())]
    torch._foreach_copy_(others, tensors)
    assert all(map(torch.equal, tensors, others))
    torch._foreach_div_(tensors, 2.0)
    assert [tensor.max().item() for tensor in tensors] == [2.0, 4.0]
    torch._foreach_add_(tensors, [torch.tensor(1.0)] * 2)
    assert [tensor.max().item() for tensor in tensors] == [3.0, 5.0]
    torch._foreach_zero_(tensors)
    assert not any(tensor.any() for tensor in tensors)


def test_a_grad_scaler_keeps_its_books(parameter: nn.Parameter) -> None:
    from torch.amp.grad_scaler import OptState

    scaler: Any = torch.amp.GradScaler("cpu", init_scale=4.0)
    has(scaler, "_scale", "_per_optimizer_states")
    assert scaler._scale is None
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scaler.scale(parameter.sum())
    assert (scaler._scale.shape, scaler._scale.item()) == ((), 4.0)
    assert scaler._per_optimizer_states[id(optimizer)]["stage"] is OptState.READY
    scaler.unscale_(optimizer)
    state = scaler._per_optimizer_states[id(optimizer)]
    assert state["stage"] is OptState.UNSCALED
    assert "found_inf_per_device" in state
    state["stage"], state["found_inf_per_device"] = OptState.STEPPED, {torch.device("cpu"): torch.ones(())}
    scaler.update()
    assert scaler.get_scale() == 2.0, f"update() does not read found_inf_per_device: {users_of('_scale')}"


def test_compiled_modules_and_checkpointed_ones_can_be_told() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    module = nn.Linear(2, 2)
    has(torch.compile(module), "_orig_mod")
    assert torch.compile(module)._orig_mod is module
    assert next(name for name, _ in torch.compile(module).named_parameters()) == "_orig_mod.weight"
    assert dict(checkpoint_wrapper(nn.Linear(2, 2)).named_children()).keys() == {"_checkpoint_wrapped_module"}


def test_a_module_that_compiles_in_place_can_be_told() -> None:
    module = nn.Linear(2, 2)
    has(module, "_compiled_call_impl")
    assert module._compiled_call_impl is None
    module.compile()
    assert module._compiled_call_impl is not None


def test_modules_keep_buffers_in_tables() -> None:
    module = nn.Module()
    has(module, "_buffers", "_non_persistent_buffers_set")
    module.register_buffer("saved", torch.ones(1))
    module.register_buffer("passing", torch.ones(1), persistent=False)
    assert list(module._buffers) == ["saved", "passing"]
    assert module._non_persistent_buffers_set == {"passing"}
    module._buffers["saved"] = other = torch.zeros(1)
    assert module.saved is other


def test_a_step_is_run_on_tensors_without_data() -> None:
    fake_tensor = importlib.import_module("torch._subclasses.fake_tensor")
    fake_pg = importlib.import_module("torch.testing._internal.distributed.fake_pg")
    has(fake_tensor, "FakeTensorMode", "DataDependentOutputException", "UnsupportedOperatorException")
    has(fake_pg, "FakeStore")
    has(torch.utils._python_dispatch, "TorchDispatchMode")
    has(torch.utils._pytree, "tree_leaves")
    with fake_tensor.FakeTensorMode():
        product = torch.ones(2, 3) @ torch.ones(3, 4)
        assert product.shape == (2, 4)
        with pytest.raises(fake_tensor.DataDependentOutputException):
            product[0, 0].item()
        with pytest.raises(fake_tensor.DynamicOutputShapeException):
            product[product > 0]


def test_tensors_count_what_is_written_to_them() -> None:
    tensor = torch.zeros(2)
    has(tensor, "_version")
    before = tensor._version
    tensor.data.fill_(1.0)  # the same memory, counted by itself
    assert tensor._version == before
    tensor[:1].fill_(1.0)
    assert tensor._version > before


def test_trees_are_flattened_and_put_together_again() -> None:
    from torch.utils import _pytree as pytree

    has(pytree, "tree_flatten", "tree_leaves", "tree_unflatten")
    tree = {"a": [1, (2, 3)], "b": {"c": 4}}
    leaves, structure = pytree.tree_flatten(tree)
    assert leaves == pytree.tree_leaves(tree) == [1, 2, 3, 4]
    assert pytree.tree_unflatten(leaves, structure) == tree


def test_python_tells_where_each_thread_is() -> None:
    frame = sys._current_frames()[threading.get_ident()]
    assert frame.f_code.co_name == test_python_tells_where_each_thread_is.__name__


def test_torch_writes_what_its_allocator_holds() -> None:
    assert list(inspect.signature(torch.cuda.memory._dump_snapshot).parameters)[:1] == ["filename"]


def test_python_walks_its_own_frames() -> None:
    frame = sys._getframe(0)
    assert frame.f_code.co_name == test_python_walks_its_own_frames.__name__


def test_operations_are_seen_in_both_directions() -> None:
    from torch.utils import _pytree as pytree
    from torch.utils._python_dispatch import TorchDispatchMode

    forward: dict[int, str] = {}
    backward: list[tuple[str, str | None]] = []

    class Seeing(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert len(func._schema.arguments) >= len(args)
            node: Any = torch._C._current_autograd_node()
            if node is None:
                forward.setdefault(torch.autograd._get_sequence_nr() - 1, str(func))
            else:
                backward.append((str(func), forward.get(node._sequence_nr())))
            return func(*args, **(kwargs or {}))

    x = torch.ones(3, requires_grad=True)
    assert pytree.tree_leaves([x])[0] is x
    with Seeing():
        x.log().exp().sum().backward()
    assert ("aten.div.Tensor", "aten.log.default") in backward
    assert ("aten.mul.Tensor", "aten.exp.default") in backward
    assert x.untyped_storage()._cdata == x[1:].untyped_storage()._cdata


def test_torch_traces_a_graph_for_tensorboard() -> None:
    from torch.utils.tensorboard import _pytorch_graph

    has(_pytorch_graph, "graph")
    traced = _pytorch_graph.graph(nn.Linear(2, 2), torch.ones(1, 2))[0]
    assert traced.SerializeToString()


def test_tensorboards_messages() -> None:
    from tensorboard.compat.proto import event_pb2, histogram_pb2, summary_pb2, tensor_pb2, types_pb2

    def fields(message: Any) -> set[str]:
        return set(message.DESCRIPTOR.fields_by_name)

    user = users_of("event_pb2")
    assert {"wall_time", "file_version", "step", "summary", "session_log", "graph_def"} <= fields(
        event_pb2.Event
    ), user
    assert event_pb2.SessionLog.START == 1, user
    assert {"min", "max", "num", "sum", "sum_squares", "bucket_limit", "bucket"} <= fields(
        histogram_pb2.HistogramProto
    ), user
    assert {"tag", "metadata", "tensor", "histo", "image", "simple_value"} <= fields(
        summary_pb2.Summary.Value
    )
    assert {"plugin_data"} <= fields(summary_pb2.SummaryMetadata), user
    assert {"height", "width", "colorspace", "encoded_image_string"} <= fields(summary_pb2.Summary.Image), (
        user
    )
    assert {"dtype", "string_val", "tensor_shape"} <= fields(tensor_pb2.TensorProto), user
    assert types_pb2.DT_STRING == 7, user


def test_wandbs_record_and_settings() -> None:
    from wandb import Settings
    from wandb.proto import wandb_internal_pb2

    record = wandb_internal_pb2.Record()
    record.history.step.num = 3
    assert record.HasField("history"), users_of("wandb_internal_pb2")
    has(Settings, "sync_file")
    assert "x_disable_stats" in Settings.model_fields, users_of("x_disable_stats")


def test_wandbs_process_has_the_name_by_which_it_is_ended() -> None:
    import wandb

    programs = {path.name for path in (Path(wandb.__file__).parent / "bin").iterdir()}
    assert "wandb-core" in programs, users_of("wandb-core")


def test_trackios_database_takes_a_row_once() -> None:
    pytest.importorskip("trackio", reason="pip install 'stability-harness[trackio]'")
    from trackio.media import utils
    from trackio.sqlite_storage import SQLiteStorage

    has(utils, "get_project_media_path")
    has(SQLiteStorage, "bulk_log", "bulk_log_system", "bulk_alert", "init_db", "get_log_count")
    has(SQLiteStorage, "validate_project_name", "get_project_db_path")
    assert {"log_ids", "run_id", "config"} <= set(inspect.signature(SQLiteStorage.bulk_log).parameters)
    assert "INSERT OR IGNORE" in inspect.getsource(SQLiteStorage.bulk_log), users_of("bulk_log")


def test_gradios_queue_waits_as_long_as_it_is_told() -> None:
    assert "self._queue = queueing.Queue(" in gradios("blocks.py"), users_of("_queue")
    text = gradios("queueing.py")
    for name in ("sleep_when_free", "progress_update_sleep_when_free"):
        assert f"asyncio.sleep(self.{name})" in text, f"Gradio's queue has no {name}: {users_of(name)}"


def test_gradios_routes_to_files() -> None:
    closed = {"/gradio_api/upload", "/gradio_api/file", "/gradio_api/proxy", "/gradio_api/deep_link"}
    assert 'API_PREFIX = "/gradio_api"' in gradios("route_utils.py"), users_of("/gradio_api/file")
    text = gradios("routes.py")
    names = re.findall(r'@router\.\w+\("/(\w*(?:upload|file|proxy|link)\w*)', text)
    paths = {f"/gradio_api/{name}" for name in names} | set(re.findall(r'"(/\w+/deep_link)"', text))
    assert closed <= paths, f"gone: {users_of('/gradio_api/file')}"
    assert paths - closed == {"/gradio_api/upload_progress"}, f"new: {users_of('/gradio_api/file')}"


def gradios(file: str) -> str:
    """The text of a module of Gradio's: to import it takes seconds."""
    spec = importlib.util.find_spec("gradio")
    if spec is None or spec.origin is None:
        pytest.skip("Gradio is not installed")
    return (Path(spec.origin).parent / file).read_text()


def test_launchers_and_wandb_set_these_variables() -> None:
    import wandb.env
    from accelerate.utils import launch
    from torch.distributed import argparse_util
    from torch.distributed.elastic.agent.server import local_elastic_agent
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous

    set_by: dict[str, Any] = {
        "WANDB_SERVICE": wandb.env,
        "TORCHELASTIC_": local_elastic_agent,
        "PET_": argparse_util,
        "ACCELERATE_USE_CPU": launch,
        "ACCELERATE_MIXED_PRECISION": launch,
        "ACCELERATE_DYNAMO_BACKEND": launch,
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": dynamic_rendezvous,
    }
    for name, module in set_by.items():
        assert name in inspect.getsource(module), f"{module.__name__} has no {name}: {users_of(name)}"


def test_torchs_folders_tell_communication() -> None:
    torchs = Path(torch.__file__).parent
    assert Path(inspect.getfile(DistributedDataParallel)).is_relative_to(torchs / "nn/parallel")
    assert Path(inspect.getfile(DTensor)).is_relative_to(torchs / "distributed/tensor")
    assert Path(inspect.getfile(dist.all_reduce)).is_relative_to(torchs / "distributed")


def test_jsonargparse_says_which_key_is_wrong() -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--number", type=int)
    with pytest.raises(argparse.ArgumentError) as caught:
        parser.parse_args(["--number", "word"])
    assert str(caught.value.message).startswith('Parser key "number"'), users_of("Parser key")


@pytest.mark.usefixtures("world_of_one")
def test_fsdp_says_what_gathers_and_reduces() -> None:
    model: Any = fully_shard(nn.Linear(2, 2), mesh=init_device_mesh("cpu", (1,)))
    group = model._get_fsdp_state()._fsdp_param_group
    has(group, "_all_gather_comm", "_reduce_scatter_comm")
    has(group._all_gather_comm, "allocate")
    own = type(group._all_gather_comm)()
    model.set_custom_all_gather(own)
    assert group._all_gather_comm is own


def test_a_dataset_of_datasets_has_a_fingerprint_of_what_was_done_to_it() -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"]})
    assert isinstance(rows._fingerprint, str), users_of("_fingerprint")
    assert rows.select([0, 1])._fingerprint != rows._fingerprint


def _functions_of(run: Callable[[], object]) -> list[Any]:
    """The operators that `run` calls."""
    from torch.utils._python_dispatch import TorchDispatchMode

    functions: list[Any] = []

    class Seeing(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            functions.append(function)
            return function(*args, **(kwargs or {}))

    with Seeing():
        run()
    return functions


def test_initialisation_is_seen_operation_by_operation() -> None:
    from torch.utils import _pytree
    from torch.utils._python_dispatch import _disable_current_modes

    linear: Any = nn.Linear(2, 2, device="meta")
    has(linear, "_apply")
    assert linear.weight.untyped_storage()._cdata != linear.bias.untyped_storage()._cdata
    (function,) = _functions_of(lambda: nn.init.normal_(linear.weight))
    assert torch.Tag.nondeterministic_seeded in function.tags
    assert function._schema.arguments[0].alias_info.is_write, users_of("OpOverload._schema")

    def unseen() -> None:
        with _disable_current_modes():
            torch.empty(2)

    assert _functions_of(unseen) == []
    leaves, structure = _pytree.tree_flatten(((1, [2]), {"a": 3}))
    assert _pytree.tree_unflatten(leaves, structure) == ((1, [2]), {"a": 3})


def test_operators_of_attention_and_the_checkpoint_wrapper() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    query = torch.randn(1, 1, 4, 8, requires_grad=True)
    seen = _functions_of(lambda: nn.functional.scaled_dot_product_attention(query, query, query))
    assert torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default in seen
    for name in (
        "_scaled_mm",
        "_grouped_mm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    ):
        has(getattr(torch.ops.aten, name), "default")
    assert sorted(checkpoint_wrapper(nn.Linear(2, 2)).state_dict()) == ["bias", "weight"]
