"""The double of `acl` must catch each misuse that ascend.md's contract lists, and let correct use pass."""

import gc
import threading
from contextlib import suppress

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from acl_double import GEAR_INPUT, AclDouble, AclMisuse, write_om

H2H, H2D, D2H, D2D = 0, 1, 2, 3
BANDS = 4
GEARS = {"static": [(2, 6)], "batch": [(1, 6), (2, 6)], "dims": [(1, 4), (2, 6)]}


@pytest.fixture(scope="module")
def oms(tmp_path_factory):
    """One .om of each kind: log_probs is twice feats, transposed; log_prob_lens is feat_lens."""
    folder = tmp_path_factory.mktemp("om")
    graph = helper.make_graph(
        [
            helper.make_node("Add", ["feats", "feats"], ["twice"]),
            helper.make_node("Transpose", ["twice"], ["log_probs"], perm=[0, 2, 1]),
            helper.make_node("Identity", ["feat_lens"], ["log_prob_lens"]),
        ],
        "twice",
        [
            helper.make_tensor_value_info("feats", TensorProto.FLOAT, ["b", BANDS, "t"]),
            helper.make_tensor_value_info("feat_lens", TensorProto.INT32, ["b"]),
        ],
        [
            helper.make_tensor_value_info("log_probs", TensorProto.FLOAT, ["b", "t", BANDS]),
            helper.make_tensor_value_info("log_prob_lens", TensorProto.INT32, ["b"]),
        ],
    )
    path = folder / "twice.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=7), path)
    return {kind: write_om(folder / f"{kind}.om", path, gears, kind, bands=BANDS) for kind, gears in GEARS.items()}


class Client:
    """Correct use of `acl`, step by step; tests go wrong somewhere on the way."""

    def __init__(self, double, om):
        self.acl = double.module
        self.om = str(om)

    def start(self):
        assert self.acl.init() == 0
        assert self.acl.rt.set_device(0) == 0
        self.context, code = self.acl.rt.create_context(0)
        assert code == 0
        self.stream, code = self.acl.rt.create_stream()
        assert code == 0
        return self

    def load(self):
        self.model, code = self.acl.mdl.load_from_file(self.om)
        assert code == 0
        self.desc = self.acl.mdl.create_desc()
        assert self.acl.mdl.get_desc(self.desc, self.model) == 0
        self.inputs, self.outputs = self.dataset("input"), self.dataset("output")
        self.host, code = self.acl.rt.malloc_host(self.outputs[2][0])
        assert code == 0
        return self

    def dataset(self, kind):
        mdl = self.acl.mdl
        dataset, addresses, sizes = mdl.create_dataset(), [], []
        for index in range(getattr(mdl, f"get_num_{kind}s")(self.desc)):
            sizes.append(getattr(mdl, f"get_{kind}_size_by_index")(self.desc, index))
            address, code = self.acl.rt.malloc(sizes[-1], 0)
            assert code == 0
            assert address % 64 == 0
            addresses.append(address)
            assert mdl.add_dataset_buffer(dataset, self.acl.create_data_buffer(address, sizes[-1])) == (dataset, 0)
        return dataset, addresses, sizes

    def upload(self, batch=2, frames=6):
        rng = np.random.default_rng(0)
        self.feats = rng.standard_normal((batch, BANDS, frames)).astype(np.float32)
        for address, size, array in zip(*self.inputs[1:], (self.feats, np.full(batch, frames, np.int32)), strict=False):
            content = array.tobytes()
            pointer = self.acl.util.bytes_to_ptr(content)
            assert self.acl.rt.memcpy(address, size, pointer, len(content), H2D) == 0
        return self

    def execute(self):
        return self.acl.mdl.execute(self.model, self.inputs[0], self.outputs[0])

    def enqueue(self):
        return self.acl.mdl.execute_async(self.model, self.inputs[0], self.outputs[0], self.stream)

    def download(self, batch=2, frames=6):
        count = batch * frames * BANDS * 4
        assert self.acl.rt.memcpy(self.host, self.outputs[2][0], self.outputs[1][0], count, D2H) == 0
        content = self.acl.util.ptr_to_bytes(self.host, count)
        return np.frombuffer(content, np.float32).reshape(batch, frames, BANDS)

    def unload(self):
        acl = self.acl
        assert acl.rt.synchronize_stream(self.stream) == 0
        assert acl.mdl.unload(self.model) == 0
        assert acl.mdl.destroy_desc(self.desc) == 0
        for dataset, _, _ in (self.inputs, self.outputs):
            for index in range(acl.mdl.get_dataset_num_buffers(dataset)):
                buffer = acl.mdl.get_dataset_buffer(dataset, index)
                assert acl.rt.free(acl.get_data_buffer_addr(buffer)) == 0
                assert acl.destroy_data_buffer(buffer) == 0
            assert acl.mdl.destroy_dataset(dataset) == 0
        assert acl.rt.free_host(self.host) == 0
        return self

    def stop(self):
        assert self.acl.rt.destroy_stream(self.stream) == 0
        assert self.acl.rt.destroy_context(self.context) == 0
        assert self.acl.rt.reset_device(0) == 0
        assert self.acl.finalize() == 0


@pytest.fixture
def double():
    return AclDouble()


@pytest.fixture
def client(double, oms):
    return Client(double, oms["static"])


@pytest.fixture
def ready(client):
    return client.start().load().upload()


def message(client):
    return client.acl.get_recent_err_msg()


# --- correct use ------------------------------------------------------------------


def test_correct_use_passes_and_computes(double, ready):
    assert ready.execute() == 0
    assert np.array_equal(ready.download(), 2 * ready.feats.transpose(0, 2, 1))
    ready.unload().stop()
    double.finish()


def test_correct_asynchronous_use_passes(double, ready):
    assert ready.enqueue() == 0
    assert ready.acl.rt.synchronize_stream(ready.stream) == 0
    assert np.array_equal(ready.download(), 2 * ready.feats.transpose(0, 2, 1))
    ready.unload().stop()
    double.finish()


def test_import_gives_the_double_only_inside(client):
    with AclDouble() as double:
        import acl

        assert acl is double.module
    with pytest.raises(ModuleNotFoundError):
        import acl


def test_a_batch_gear_computes_that_batch(double, oms):
    client = Client(double, oms["batch"]).start().load().upload(batch=1)
    mdl = client.acl.mdl
    assert mdl.get_dynamic_batch(client.desc) == ({"batchCount": 2, "batch": [1, 2]}, 0)
    assert mdl.get_input_dims(client.desc, 0)[0]["dims"] == [-1, BANDS, 6]
    assert client.inputs[2][0] == 2 * BANDS * 6 * 4  # the largest gear
    index, code = mdl.get_input_index_by_name(client.desc, GEAR_INPUT)
    assert (index, code) == (2, 0)
    assert mdl.set_dynamic_batch_size(client.model, client.inputs[0], index, 1) == 0
    assert mdl.get_cur_output_dims(client.desc, 0)[0]["dims"] == [1, 6, BANDS]
    assert client.execute() == 0
    assert np.array_equal(client.download(batch=1), 2 * client.feats.transpose(0, 2, 1))
    client.unload().stop()
    double.finish()


def test_a_time_gear_takes_all_dims_of_all_inputs(double, oms):
    client = Client(double, oms["dims"]).start().load().upload(batch=1, frames=4)
    mdl = client.acl.mdl
    assert mdl.get_input_dynamic_gear_count(client.desc, -1) == (2, 0)
    gears, code = mdl.get_input_dynamic_dims(client.desc, -1, 2)
    assert code == 0
    assert [gear["dims"] for gear in gears] == [[1, BANDS, 4, 1], [2, BANDS, 6, 2]]
    setting = {"name": "", "dimCount": 4, "dims": [1, BANDS, 4, 1]}
    assert mdl.set_input_dynamic_dims(client.model, client.inputs[0], 2, setting) == 0
    assert client.execute() == 0
    assert np.array_equal(client.download(batch=1, frames=4), 2 * client.feats.transpose(0, 2, 1))
    client.unload().stop()
    double.finish()


def test_the_older_utilities(oms):
    double = AclDouble(bytes_api=False)
    client = Client(double, oms["static"]).start()
    util, rt = client.acl.util, client.acl.rt
    assert not hasattr(util, "bytes_to_ptr")
    values = np.arange(6, dtype=np.float32)
    host, _ = rt.malloc_host(24)
    assert rt.memcpy(host, 24, util.numpy_to_ptr(values), 24, H2H) == 0
    assert np.array_equal(util.ptr_to_numpy(host, (2, 3), 11), values.reshape(2, 3))
    back = np.zeros(6, np.float32)
    assert rt.memcpy(util.numpy_to_ptr(back), 24, host, 24, H2H) == 0
    assert np.array_equal(back, values)
    assert rt.free_host(host) == 0
    client.stop()
    double.finish()


def test_asynchronous_copies_happen_at_synchronize(double, client):
    client.start()
    rt, util = client.acl.rt, client.acl.util
    device, _ = rt.malloc(8, 2)
    host, _ = rt.malloc_host(8)
    content = b"abcdefgh"
    assert rt.memcpy(device, 8, util.bytes_to_ptr(content), 8, H2D) == 0
    assert rt.memcpy_async(host, 8, device, 8, D2H, client.stream) == 0
    with pytest.raises(AclMisuse, match="before synchronize_stream"):
        util.ptr_to_bytes(host, 8)
    assert rt.synchronize_stream(client.stream) == 0
    assert util.ptr_to_bytes(host, 8) == content


# --- codes, and the messages that go with them ------------------------------------


def refused(client, call, *args):
    """The code that a call fails with; its message is read."""
    result = call(*args)
    assert message(client)
    assert message(client) is None  # reading clears
    return result[-1] if isinstance(result, tuple) else result


def test_codes_of_the_contract(double, ready, oms):
    acl, rt, mdl = ready.acl, ready.acl.rt, ready.acl.mdl
    address, size = ready.inputs[1][0], ready.inputs[2][0]
    pointer = acl.util.bytes_to_ptr(content := bytes(size + 4))
    assert refused(ready, acl.init) == 100002
    assert refused(ready, rt.malloc, 0, 0) == 100000
    assert refused(ready, rt.malloc, 1 << 40, 0) == 207001
    assert refused(ready, mdl.execute, 0, ready.inputs[0], ready.outputs[0]) == 100000
    assert refused(ready, rt.memcpy, address, size - 4, pointer, size, H2D) == 107000
    assert refused(ready, rt.set_device, 1) == 107001
    assert refused(ready, mdl.get_desc, ready.desc, 12345) == 145003
    assert refused(ready, mdl.load_from_file, "/no/such.om") == 100000
    assert refused(ready, mdl.get_input_index_by_name, ready.desc, "nothing") == 100000
    assert len(content) == size + 4
    other, _ = rt.create_context(0)
    assert refused(ready, rt.synchronize_stream, ready.stream) == 107003
    assert rt.destroy_context(other) == 0
    assert refused(ready, rt.get_context) == 107002
    assert rt.set_context(ready.context) == 0
    assert ready.execute() == 0
    ready.unload().stop()
    assert refused(ready, acl.finalize) == 100037
    double.finish()


def test_codes_of_gears(double, oms):
    client = Client(double, oms["dims"]).start().load()
    setter = client.acl.mdl.set_input_dynamic_dims

    def setting(*dims):
        return {"name": "", "dimCount": len(dims), "dims": list(dims)}

    assert refused(client, setter, client.model, client.inputs[0], 2, setting(1, BANDS, 4)) == 145012
    assert refused(client, setter, client.model, client.inputs[0], 2, setting(1, BANDS, 5, 1)) == 145013
    assert refused(client, setter, client.model, client.inputs[0], 0, setting(1, BANDS, 4, 1)) == 100000
    batches = Client(AclDouble(), oms["batch"]).start().load()
    setter = batches.acl.mdl.set_dynamic_batch_size
    assert refused(batches, setter, batches.model, batches.inputs[0], 2, 3) == 145013


def test_a_buffer_too_small_for_the_model(double, client):
    client.start().load()
    mdl = client.acl.mdl
    dataset = mdl.create_dataset()
    for address, size in zip(*client.inputs[1:], strict=True):
        mdl.add_dataset_buffer(dataset, client.acl.create_data_buffer(address, size - 4))
    assert refused(client, mdl.execute, client.model, dataset, client.outputs[0]) == 145000


def test_messages_belong_to_their_thread(double, client):
    client.start()
    client.acl.rt.malloc(0, 0)
    found = []
    thread = threading.Thread(target=lambda: found.append(message(client)))
    thread.start()
    thread.join()
    assert found == [None]
    assert "size 0" in message(client)


def test_an_injected_failure(oms):
    double = AclDouble(fail_at=3, fail_code=507018)
    client = Client(double, oms["static"])
    assert client.acl.init() == client.acl.rt.set_device(0) == 0
    assert client.acl.rt.create_context(0) == (0, 507018)
    assert double.injected == "rt.create_context"
    assert "injected failure of call 3" in message(client)
    assert client.acl.rt.reset_device(0) == client.acl.finalize() == 0
    double.finish()


@pytest.mark.parametrize(
    ("name", "args", "result"),
    [
        ("create_desc", (), 0),
        ("get_num_inputs", ("desc",), 0),
        ("get_input_name_by_index", ("desc", 0), ""),
        ("get_input_data_type", ("desc", 0), -1),
        ("get_input_dims", ("desc", 0), ({}, 507011)),
    ],
)
def test_what_a_failed_call_gives(double, client, name, args, result):
    client.start().load()
    double.fail_at = len(double.calls) + 1
    values = [client.desc if arg == "desc" else arg for arg in args]
    assert getattr(client.acl.mdl, name)(*values) == result
    assert "injected" in message(client)


def test_a_failed_synchronize_leaves_outputs_poisoned(double, ready):
    assert ready.enqueue() == 0
    double.fail_at = len(double.calls) + 1
    assert ready.acl.rt.synchronize_stream(ready.stream) == 507011
    message(ready)
    with pytest.raises(AclMisuse, match="never written"):
        ready.download()


# --- misuse -----------------------------------------------------------------------


def caught(what):
    return pytest.raises(AclMisuse, match=what)


def test_a_call_before_init(client):
    with caught("before init"):
        client.acl.rt.set_device(0)


def test_a_device_that_was_not_set(client):
    client.acl.init()
    with caught("create_context before set_device"):
        client.acl.rt.create_context(0)
    with caught("reset_device of 0, which is not set"):
        client.acl.rt.reset_device(0)


def test_a_call_after_finalize(client):
    client.start().stop()
    with caught("after finalize"):
        client.acl.rt.set_device(0)


def test_a_thread_without_a_context(double, client):
    client.start()
    results = []

    def other():
        with suppress(AclMisuse):
            client.acl.rt.malloc(4, 0)
        client.acl.rt.set_context(client.context)
        results.append(client.acl.rt.malloc(4, 0)[1])

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert results == [0]
    assert double.misuses == ["acl.rt.malloc called by a thread without a context"]


def test_a_destroyed_context(client):
    client.start()
    other, _ = client.acl.rt.create_context(0)
    client.acl.rt.destroy_context(other)
    with caught("context .* used after destroy"):
        client.acl.rt.set_context(other)


def test_double_free(client):
    client.start()
    address, _ = client.acl.rt.malloc(4, 0)
    client.acl.rt.free(address)
    with caught("freed before"):
        client.acl.rt.free(address)


def test_free_of_an_unknown_pointer(client):
    client.start()
    with caught("no start of a block"):
        client.acl.rt.free(0x1000)


def test_free_of_an_interior_pointer(client):
    client.start()
    address, _ = client.acl.rt.malloc(128, 0)
    with caught("no start of a block"):
        client.acl.rt.free(address + 64)


def test_free_of_host_memory(client):
    client.start()
    with caught("free of host memory"):
        client.acl.rt.free(client.acl.rt.malloc_host(4)[0])


def test_free_host_of_device_memory(client):
    client.start()
    with caught("free_host of device memory"):
        client.acl.rt.free_host(client.acl.rt.malloc(4, 0)[0])


@pytest.mark.parametrize(
    ("limit", "count", "what"), [(128, 64, "dest_max 128 is beyond the 64"), (64, 64, "count 64 is beyond the 32")]
)
def test_sizes_beyond_the_allocation(client, limit, count, what):
    client.start()
    address, _ = client.acl.rt.malloc(64, 0)
    content = bytes(32)
    with caught(what):
        client.acl.rt.memcpy(address, limit, client.acl.util.bytes_to_ptr(content), count, H2D)


def test_a_copy_from_nowhere(client):
    client.start()
    address, _ = client.acl.rt.malloc(64, 0)
    with caught("unknown pointer 0x1000"):
        client.acl.rt.memcpy(address, 64, 0x1000, 64, H2D)


def test_a_data_buffer_beyond_the_allocation(client):
    client.start()
    with caught("size 65 is beyond the 64"):
        client.acl.create_data_buffer(client.acl.rt.malloc(64, 0)[0], 65)


@pytest.mark.parametrize("kind", [H2H, D2H, D2D])
def test_the_wrong_kind_of_copy(client, kind):
    client.start()
    address, _ = client.acl.rt.malloc(8, 0)
    content = bytes(8)
    with caught("kind"):
        client.acl.rt.memcpy(address, 8, client.acl.util.bytes_to_ptr(content), 8, kind)


def test_outputs_read_before_synchronising(ready):
    ready.enqueue()
    with caught("read before synchronize_stream"):
        ready.download()


def test_outputs_read_before_any_execute(ready):
    with caught("never written"):
        ready.download()


def test_outputs_are_poisoned_by_the_next_execute(ready):
    assert ready.acl.rt.synchronize_stream(ready.stream) == ready.enqueue() == 0
    assert ready.acl.rt.synchronize_stream(ready.stream) == 0
    ready.download()
    ready.enqueue()
    with caught("read before synchronize_stream"):
        ready.download()


def test_inputs_overwritten_in_flight(ready):
    ready.enqueue()
    with caught("memcpy into memory that work in flight uses"):
        ready.upload()


def test_inputs_never_written(client):
    client.start().load()
    with caught("feats holds 0 bytes of 192"):
        client.execute()


def test_borrowed_bytes_that_were_collected(client):
    client.start()
    address, _ = client.acl.rt.malloc(1000, 0)
    pointer = client.acl.util.bytes_to_ptr(bytes(1000))
    gc.collect()
    with caught("its object was collected"):
        client.acl.rt.memcpy(address, 1000, pointer, 1000, H2D)


def test_a_borrowed_array_that_was_collected(oms):
    client = Client(AclDouble(bytes_api=False), oms["static"]).start()
    address, _ = client.acl.rt.malloc(40, 0)
    pointer = client.acl.util.numpy_to_ptr(np.zeros(10, np.float32))
    with caught("its object was collected"):
        client.acl.rt.memcpy(address, 40, pointer, 40, H2D)


def test_a_borrowed_target_that_was_collected(oms):
    client = Client(AclDouble(bytes_api=False), oms["static"]).start()
    values = np.ones(10, np.float32)
    host, _ = client.acl.rt.malloc_host(40)
    client.acl.rt.memcpy(host, 40, client.acl.util.numpy_to_ptr(values), 40, H2H)
    pointer = client.acl.util.numpy_to_ptr(np.zeros(10, np.float32))
    with caught("its object was collected"):
        client.acl.rt.memcpy(pointer, 40, host, 40, H2H)


def test_a_copy_into_bytes(client):
    client.start()
    source, target = bytes(1000), bytes(1000)
    host, _ = client.acl.rt.malloc_host(1000)
    client.acl.rt.memcpy(host, 1000, client.acl.util.bytes_to_ptr(source), 1000, H2H)
    with caught("lent for reading"):
        client.acl.rt.memcpy(client.acl.util.bytes_to_ptr(target), 1000, host, 1000, H2H)


def test_an_asynchronous_copy_of_borrowed_memory(client):
    client.start()
    address, _ = client.acl.rt.malloc(8, 0)
    content = b"abcdefgh"
    with caught("needs memory of malloc_host"):
        client.acl.rt.memcpy_async(address, 8, client.acl.util.bytes_to_ptr(content), 8, H2D, client.stream)


def test_an_array_that_is_not_contiguous(oms):
    client = Client(AclDouble(bytes_api=False), oms["static"]).start()
    with caught("not contiguous"):
        client.acl.util.numpy_to_ptr(np.zeros((4, 4), np.float32)[:, ::2])


def test_device_memory_read_by_the_host(ready):
    with caught("device memory read by the host"):
        ready.acl.util.ptr_to_bytes(ready.inputs[1][0], 4)


def test_a_type_number_that_is_not_of_numpy(oms):
    client = Client(AclDouble(bytes_api=False), oms["static"]).start()
    with caught("no type number"):
        client.acl.util.ptr_to_numpy(client.acl.rt.malloc_host(8)[0], (2,), 27)


def test_a_missing_input_buffer(client):
    client.start().load()
    with caught("0 input buffers for 2 inputs"):
        client.acl.mdl.execute(client.model, client.acl.mdl.create_dataset(), client.outputs[0])


def test_a_buffer_larger_than_the_input(client):
    client.start().load()
    acl, dataset = client.acl, client.acl.mdl.create_dataset()
    for size in client.inputs[2]:
        acl.mdl.add_dataset_buffer(dataset, acl.create_data_buffer(acl.rt.malloc(size + 4, 0)[0], size + 4))
    with caught("196 bytes for feats, which takes 192"):
        acl.mdl.execute(client.model, dataset, client.outputs[0])


def test_a_description_before_get_desc(client):
    client.start()
    with caught("before get_desc"):
        client.acl.mdl.get_num_inputs(client.acl.mdl.create_desc())


def test_a_gear_set_while_the_model_runs(oms):
    client = Client(AclDouble(), oms["batch"]).start().load().upload()
    client.acl.mdl.set_dynamic_batch_size(client.model, client.inputs[0], 2, 2)
    client.enqueue()
    with caught("a gear set while the model runs"):
        client.acl.mdl.set_dynamic_batch_size(client.model, client.inputs[0], 2, 2)


def test_a_gear_setter_on_a_static_model(ready):
    with caught("static model"):
        ready.acl.mdl.set_dynamic_batch_size(ready.model, ready.inputs[0], 0, 1)


def test_the_setter_of_another_kind(oms):
    client = Client(AclDouble(), oms["dims"]).start().load()
    with caught("setter of batch"):
        client.acl.mdl.set_dynamic_batch_size(client.model, client.inputs[0], 2, 1)


def test_a_gear_not_set(oms):
    client = Client(AclDouble(), oms["batch"]).start().load().upload()
    client.acl.mdl.set_dynamic_batch_size(client.model, client.inputs[0], 2, 2)
    assert client.execute() == 0
    with caught("without a gear"):
        client.execute()  # each execute needs its own


def test_current_dims_before_a_gear_is_set(oms):
    client = Client(AclDouble(), oms["batch"]).start().load()
    with caught("before a gear was set"):
        client.acl.mdl.get_cur_output_dims(client.desc, 0)


@pytest.mark.parametrize("kind", ["model", "desc", "dataset", "buffer"])
def test_use_after_destroy(ready, kind):
    acl, mdl = ready.acl, ready.acl.mdl
    if kind == "model":
        mdl.unload(ready.model)
    elif kind == "desc":
        mdl.destroy_desc(ready.desc)
    elif kind == "dataset":
        mdl.destroy_dataset(ready.inputs[0])
    else:
        acl.destroy_data_buffer(mdl.get_dataset_buffer(ready.inputs[0], 0))
    with caught(f"{kind} .* used after destroy"):
        mdl.get_num_inputs(ready.desc) if kind == "desc" else ready.execute()


def test_execute_on_memory_that_was_freed(ready):
    ready.acl.rt.free(ready.inputs[1][0])
    with caught("freed before"):
        ready.execute()


def test_a_handle_of_another_kind(ready):
    with caught("is no dataset"):
        ready.acl.mdl.destroy_dataset(ready.desc)


@pytest.mark.parametrize("what", ["unload", "destroy_dataset", "destroy_stream", "free"])
def test_release_with_work_in_flight(ready, what):
    acl = ready.acl
    calls = {
        "unload": lambda: acl.mdl.unload(ready.model),
        "destroy_dataset": lambda: acl.mdl.destroy_dataset(ready.inputs[0]),
        "destroy_stream": lambda: acl.rt.destroy_stream(ready.stream),
        "free": lambda: acl.rt.free(ready.outputs[1][0]),
    }
    ready.enqueue()
    with caught("work in flight"):
        calls[what]()


def test_both_ways_to_execute_in_one_session(ready):
    assert ready.execute() == 0
    with caught("both synchronously and asynchronously"):
        ready.enqueue()


def test_one_model_on_two_streams(ready):
    ready.enqueue()
    ready.stream, _ = ready.acl.rt.create_stream()
    with caught("two streams at once"):
        ready.enqueue()


def test_one_model_in_two_threads(double, ready):
    inside, go_on = threading.Event(), threading.Event()
    compute = double.compute

    def slow(om, arrays):
        inside.set()
        go_on.wait(5)
        return compute(om, arrays)

    def other():
        ready.acl.rt.set_context(ready.context)
        ready.execute()

    double.compute = slow
    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(5)
    with caught("runs twice at once"):
        ready.execute()
    with caught("work in flight"):
        ready.upload()
    with caught("while an execute uses it"):
        ready.acl.rt.memcpy(ready.host, 192, ready.inputs[1][0], 192, D2H)
    go_on.set()
    thread.join()


def test_a_model_in_another_context(ready):
    ready.acl.rt.create_context(0)
    with caught("another context"):
        ready.execute()


@pytest.mark.parametrize(
    ("last", "what"),
    [
        ("destroy_context", "before destroy_stream"),
        ("reset_device", "before destroy_context"),
        ("finalize", "before reset_device"),
    ],
)
def test_the_order_down(client, last, what):
    client.start()
    calls = {
        "destroy_context": lambda: client.acl.rt.destroy_context(client.context),
        "reset_device": lambda: client.acl.rt.reset_device(0),
        "finalize": client.acl.finalize,
    }
    with caught(what):
        calls[last]()


def test_a_model_left_in_its_context(client):
    client.start()
    client.acl.mdl.load_from_file(client.om)
    client.acl.rt.destroy_stream(client.stream)
    with caught("before unload"):
        client.acl.rt.destroy_context(client.context)


def test_memory_left_in_its_context(client):
    client.start()
    client.acl.rt.malloc(4, 0)
    client.acl.rt.destroy_stream(client.stream)
    with caught("before its memory was freed"):
        client.acl.rt.destroy_context(client.context)


@pytest.mark.parametrize("kind", ["desc", "dataset", "buffer"])
def test_a_handle_that_leaks(double, client, kind):
    client.start()
    if kind == "buffer":
        address, _ = client.acl.rt.malloc(4, 0)
        client.acl.create_data_buffer(address, 4)
        client.acl.rt.free(address)
    else:
        getattr(client.acl.mdl, f"create_{kind}")()
    client.stop()
    with caught(f"leak: 1 of {kind}"):
        double.finish()


def test_everything_that_leaks(double, ready):
    with pytest.raises(AclMisuse) as error:
        double.finish()
    assert str(error.value) == (
        "leak: 1 of context; leak: 1 of stream; leak: 1 of model; leak: 1 of desc; leak: 2 of dataset; "
        "leak: 4 of buffer; leak: 5 blocks of device and host memory; leak: no reset_device of [0]; no finalize"
    )


def test_a_missing_finalize(double, client):
    client.acl.init()
    with caught("no finalize"):
        double.finish()


def test_a_message_that_nobody_reads(double, client):
    client.start()
    client.acl.rt.malloc(0, 0)
    with caught("before anyone read the message"):
        client.acl.rt.malloc(4, 0)
    message(client)
    client.stop()
    with caught("before anyone read the message"):  # swallowed, it still counts
        double.finish()


def test_a_message_left_at_the_end(double, client):
    client.start().stop()
    client.acl.finalize()
    with caught("nobody read: repeated finalize"):
        double.finish()


@pytest.mark.parametrize("args", [(), ("64", 0), (64.0, 0), (np.int64(64), 0), (64,), (64, 0, 0)])
def test_wrong_signatures(client, args):
    client.start()
    with pytest.raises(TypeError):
        client.acl.rt.malloc(*args)
