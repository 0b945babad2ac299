"""The serving example: a batch of mixed adapters answers each request as if it came alone."""

import asyncio
import contextlib
import io
import threading
import time

import pytest
import torch
from conftest import need, need_extra

need_extra("serving")
need("timm")

httpx = need("httpx")

import convlora
from benchmarks.overhead.subjects import make_base
from benchmarks.routing import ours
from benchmarks.serving import batching
from benchmarks.serving.batching import Batcher, routed

program, web = need("benchmarks.serving.__main__"), need("benchmarks.serving.app")
attacks = need("benchmarks.serving.attacks")
Image = need("PIL.Image")

SIZE = 32
NAMES = ["a0", "a1", "a2"]


@pytest.fixture(scope="module")
def model():
    return ours(make_base("test_resnet"), 3, 2)


def picture(seed):
    return program.picture(SIZE, seed)


@contextlib.asynccontextmanager
async def serving_client(app):
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client,
    ):
        yield client


def asked(batcher, requests):
    """The answers to these requests, all sent at once, through the whole application."""

    async def run():
        app = web.make_app(batcher, NAMES, SIZE)
        async with serving_client(app) as client:
            posts = (
                client.post("/predict", params=params, content=body, headers=headers[0] if headers else None)
                for params, body, *headers in requests
            )
            return await asyncio.gather(*posts)

    return asyncio.run(run())


def test_a_batch_of_mixed_adapters_equals_each_alone(model):
    names = ["a1", None, "a0", "a2", "a1", "a0"]
    requests = [({} if name is None else {"adapter": name}, picture(seed)) for seed, name in enumerate(names)]
    batcher = Batcher(routed(model), largest=len(names), wait=10.0)  # full long before
    answers = asked(batcher, requests)
    assert batcher.batches == [len(names)]
    for seed, (name, answer) in enumerate(zip(names, answers, strict=True)):
        with torch.no_grad():
            image = web.pixels(picture(seed), SIZE)[None]
            if name is None:
                with convlora.disable_adapter(model):
                    expected = model(image)[0]
            else:
                convlora.set_adapter(model, name)
                expected = model(image)[0]
        assert answer.status_code == 200 and answer.json()["adapter"] == name
        torch.testing.assert_close(torch.tensor(answer.json()["logits"]), expected, rtol=1e-4, atol=1e-5)  # rounding


def test_requests_that_name_weights_get_the_weighted_adapters_as_if_each_came_alone(model):
    wanted = [{"a1": 0.25, "a0": 0.75}, "a1", {"a2": -0.5}, None, {"a0": 1.0, "a1": 1.0, "a2": 2.0}, {"a0": 0.0}]
    requests = []
    for seed, each in enumerate(wanted):
        words = (
            [f"{name}:{weight}" for name, weight in each.items()] if isinstance(each, dict) else [each] if each else []
        )
        requests.append(({"adapter": words}, picture(seed)))
    batcher = Batcher(routed(model), largest=len(wanted), wait=10.0)
    answers = asked(batcher, requests)
    assert batcher.batches == [len(wanted)]
    for seed, (each, answer) in enumerate(zip(wanted, answers, strict=True)):
        with contextlib.ExitStack() as block, torch.no_grad():
            block.enter_context(convlora.disable_adapter(model)) if each is None else convlora.set_adapter(model, each)
            expected = model(web.pixels(picture(seed), SIZE)[None])[0]
        assert answer.status_code == 200 and answer.json()["adapter"] == each
        torch.testing.assert_close(torch.tensor(answer.json()["logits"]), expected, rtol=1e-4, atol=1e-5)  # rounding
    convlora.set_adapter(model, "a0")


@pytest.mark.parametrize(
    "words, status, says",
    [
        (["a0:x"], 422, "a0:x: a weight is a number from -10 to 10"),
        (["a0:"], 422, "a weight is a number"),
        (["a0:nan"], 422, "a weight is a number"),
        (["a0:1e300"], 422, "a weight is a number"),
        (["a0:" + "9" * 50_000], 422, "a weight is a number"),
        (["a0:0.5", "b:0.5"], 404, "no adapter 'b:0.5'; there are a0, a1, a2"),
        (["a0:0.5", "a0"], 422, "a0 is asked for twice"),
        ([""], 404, "no adapter ''"),
    ],
)
def test_a_weight_that_is_none_is_told_and_disturbs_no_batch(model, words, status, says):
    bad, good = asked(Batcher(routed(model), wait=0.001), [({"adapter": words}, picture(0)), ({}, picture(0))])
    assert (bad.status_code, good.status_code) == (status, 200)
    assert says in bad.json()["detail"] and len(bad.json()["detail"]) < 400


def test_adapters_that_do_not_go_together_are_refused_to_their_request_alone():
    net = make_base("test_resnet")
    convlora.inject(net, 2, adapter_name="factors")
    convlora.add_adapter(net, "whole", 2, target_modules="layer1.*", modules_to_save=["fc", "conv1"])
    convlora.add_adapter(net, "late", 2, target_modules="layer4.*")
    names = ["factors", "whole", "late"]
    apart = batching.apart(net.eval(), names)
    assert set(apart) == {frozenset(("factors", "whole"))}

    async def run():
        app = web.make_app(Batcher(routed(net), wait=0.01), names, SIZE, apart=apart)
        pairs = [["factors:0.5", "whole:0.5"], ["whole:0.5", "late:0.5"], ["factors:0.5", "late"]]
        async with serving_client(app) as client:
            posts = (client.post("/predict", params={"adapter": pair}, content=picture(0)) for pair in pairs)
            return await asyncio.gather(*posts)

    refused, *good = asyncio.run(run())
    assert (
        refused.status_code == 422 and "trained in full in 'whole' and changed in 'factors'" in refused.json()["detail"]
    )
    assert [answer.status_code for answer in good] == [200, 200]


def test_batches_are_no_larger_than_asked_for(model):
    batcher = Batcher(routed(model), largest=2, wait=10.0)
    answers = asked(batcher, [({"adapter": "a0"}, picture(seed)) for seed in range(4)])
    assert batcher.batches == [2, 2] and len({tuple(answer.json()["logits"]) for answer in answers}) == 4


def test_a_request_does_not_wait_for_others_that_never_come(model):
    batcher = Batcher(routed(model), wait=0.001)
    (answer,) = asked(batcher, [({"adapter": "a0"}, picture(0))])
    assert answer.status_code == 200 and batcher.batches == [1]


def test_bad_requests_are_told_apart_and_disturb_no_batch(model):
    unknown, no_image, good = asked(
        Batcher(routed(model), wait=0.001),
        [({"adapter": "x"}, picture(0)), ({"adapter": "a0"}, b"no image"), ({"adapter": "a0"}, picture(0))],
    )
    assert unknown.status_code == 404 and "a0, a1, a2" in unknown.json()["detail"]
    assert no_image.status_code == 415 and "PNG, JPEG, WebP and TIFF" in no_image.json()["detail"]
    assert good.status_code == 200


def test_broken_image_files_are_no_images(model):
    start, rest = picture(0)[:33], picture(0)[33:]  # to the end of the header
    short = start[:8] + attacks.chunk(b"IHDR", b"1234") + rest
    nameless = start + attacks.chunk(b"IDAT", rest[8:28]) + attacks.chunk(b"\xff\xff\xff\xff", b"")
    answers = asked(Batcher(routed(model), wait=0.001), [({}, body) for body in (short, nameless, picture(0)[:-40])])
    assert [answer.status_code for answer in answers] == [422, 422, 422]


@pytest.mark.parametrize("name", [name for name, attack in attacks.ATTACKS.items() if attack.times == 1])
def test_each_attack_gets_its_answer_in_words_and_the_next_request_is_answered(model, name):
    attack = attacks.ATTACKS[name]

    async def parts(body):
        for part in body:
            yield part

    body = attack.body()
    body = body if isinstance(body, bytes) else parts(body)
    hostile, good = asked(
        Batcher(routed(model), wait=0.001),
        [({"adapter": attack.adapter}, body, attack.headers), ({"adapter": "a0"}, picture(0))],
    )
    assert {hostile.status_code} == attack.answers and good.status_code == 200
    assert hostile.status_code == 200 or 10 < len(hostile.json()["detail"]) < 400


def test_formats_that_are_read_give_an_answer_and_of_several_pictures_the_first(model):
    def saved(kind, **options):
        file = io.BytesIO()
        Image.new("RGB", (40, 40), "red").save(file, kind, **options)
        return file.getvalue()

    more = {"save_all": True, "append_images": [Image.new("RGB", (40, 40), "blue")]}
    bodies = [saved("PNG"), saved("JPEG", progressive=True), saved("WEBP"), saved("WEBP", lossless=True), saved("TIFF")]
    bodies += [
        saved("TIFF", compression="tiff_lzw"),
        saved("WEBP", **more),
        saved("TIFF", **more),
        saved("PNG", **more),
    ]
    for body in bodies:
        red, green, blue = web.pixels(body, 4).mean((1, 2))
        assert red > 0.95 and green < -0.95 and blue < -0.95


def test_one_request_too_many_is_told_to_come_again_before_its_body_is_read(model):
    decoding, go_on = threading.Event(), threading.Event()

    def forward(names, images):
        decoding.set()
        go_on.wait(10)
        return images.flatten(1)

    async def never():
        raise AssertionError("read")
        yield b""

    async def run():
        app = web.make_app(Batcher(forward, wait=0.001), NAMES, SIZE, waiting=1)
        async with serving_client(app) as client:
            first = asyncio.create_task(client.post("/predict", content=picture(0)))
            await asyncio.to_thread(decoding.wait, 10)
            second = await client.post("/predict", content=never())
            go_on.set()
            return await first, second, await client.post("/predict", content=picture(0))

    first, second, third = asyncio.run(run())
    assert first.status_code == third.status_code == 200
    assert second.status_code == 503 and second.headers["Retry-After"] == "1"


def test_a_body_that_does_not_arrive_gives_its_place_back(model):
    async def slow():
        yield b"x"
        await asyncio.sleep(60)

    async def run():
        app = web.make_app(Batcher(routed(model), wait=0.001), NAMES, SIZE, waiting=1, patience=0.05)
        async with serving_client(app) as client:
            return await client.post("/predict", content=slow()), await client.post("/predict", content=picture(0))

    late, good = asyncio.run(run())
    assert late.status_code == 408 and good.status_code == 200


def test_no_more_images_are_decoded_at_once_than_said(model, monkeypatch):
    at_once, most, lock = 0, 0, threading.Lock()
    real = web.pixels

    def counted(data, size):
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.02)
        image = real(data, size)
        with lock:
            at_once -= 1
        return image

    monkeypatch.setattr("benchmarks.serving.app.pixels", counted)
    answers = asked(Batcher(routed(model), wait=0.001), [({}, picture(0))] * 8)
    assert [answer.status_code for answer in answers] == [200] * 8 and most == web.DECODERS


def test_an_error_in_a_forward_reaches_its_requests_and_the_next_ones_are_answered():
    calls = []

    def forward(names, images):
        calls.append(len(names))
        if len(calls) == 1:
            raise RuntimeError("broken")
        return images.flatten(1)

    async def run():
        async with Batcher(forward, largest=2, wait=10.0) as batcher:
            pairs = [(batcher.predict(None, torch.ones(1)), batcher.predict(None, torch.ones(1))) for _ in range(2)]
            return await asyncio.gather(*pairs[0], return_exceptions=True), await asyncio.gather(*pairs[1])

    first, second = asyncio.run(run())
    assert [str(each) for each in first] == ["broken", "broken"] and all(float(each) == 1 for each in second)


@pytest.mark.parametrize(
    ("forward", "sizes", "says"),
    [
        (lambda names, images: images, (1, 2), "equal size"),
        (lambda names, images: images[1:] if len(images) > 1 else images, (1, 1), "shorter"),
    ],
)
def test_a_batch_that_fails_before_or_behind_its_forward_is_no_end_of_the_others(forward, sizes, says):
    async def run():
        async with Batcher(forward, largest=2, wait=0.1) as batcher:
            bad = [batcher.predict(None, torch.ones(size)) for size in sizes]
            failed = await asyncio.gather(*bad, return_exceptions=True)
            return failed, await asyncio.wait_for(batcher.predict(None, torch.ones(1)), 10)

    failed, answer = asyncio.run(run())
    assert all(says in str(each) for each in failed) and float(answer) == 1


@pytest.mark.parametrize("largest", [1, 2])  # in its forward; waiting for another
def test_a_batch_that_is_not_done_when_the_batcher_closes_is_cancelled(largest):
    started, go_on = threading.Event(), threading.Event()

    def forward(names, images):
        started.set()
        go_on.wait(10)
        return images

    async def run():
        async with Batcher(forward, largest=largest, wait=60.0) as batcher:
            waiting = asyncio.create_task(batcher.predict(None, torch.ones(1)))
            await asyncio.sleep(0)
            await (asyncio.to_thread(started.wait, 10) if largest == 1 else asyncio.sleep(0.1))
            asyncio.get_running_loop().call_soon(go_on.set)
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(waiting, 10)

    asyncio.run(run())


def test_the_load_test_runs_on_loopback_and_prints_what_it_says(capsys):
    small = ["--model", "test_resnet", "--size", "32", "--adapters", "2", "--rank", "2"]
    program.main(["load", *small, "--clients", "2", "--requests", "4", "--rounds", "1"])
    printed = capsys.readouterr().out
    assert "requests/s" in printed and "one after another: 4 batches, 1.0 samples each" in printed
