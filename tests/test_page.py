"""The page to look at: its data, and what it does in a real browser where there is one."""

import dataclasses
import json
import pathlib
import shutil

import pytest
from builders import refused

from neumeta_jax.core.inr import make_inr
from neumeta_jax.errors import UsageError
from neumeta_jax.evaluation.rows import GridRow
from neumeta_jax.networks import cifar_resnet, linen
from neumeta_jax.networks.cifar_spec import morph, resnet_spec
from neumeta_jax.report import page

SPEC, BLOCKS = resnet_spec(14, num_classes=10, stage_widths=(4, 8, 16), image_size=8), (1, 3)
FAMILY = cifar_resnet.hypernetwork(SPEC, BLOCKS, make_inr("grid"))


def row(ratio, widths, accuracy):
    small = morph(SPEC, BLOCKS, widths)
    trained = 0.5 <= ratio <= 1
    return GridRow(ratio, widths, small.num_params, small.num_macs, accuracy, trained)


ROWS = [
    dataclasses.replace(row(1.0, (4, 8), 0.75), int8_accuracy=0.7),
    row(0.5, (2, 4), 0.625),
    row(0.25, (1, 2), 0.25),
    row(1.0, (0, 8), 0.5),
    row(0.5, (0, 3), 0.375),
]


def measured(widths, p50):
    latency = {"jax": {"1": {"p50_ms": p50, "p90_ms": 2 * p50, "calls": 9}}}
    return {"widths": widths, "latency": latency}


LATENCY = {
    "device": "a test",
    "rows": [measured([4, 8], 3.0), measured([2, 4], 1.5), measured([3, 3], 1.0)],
}


def document(**changes):
    options = {
        "heading": ("ResNet14 on </script><b>noise</b>", "A test"),
        "trained_range": (0.5, 1.0),
        "teacher_accuracy": 0.8,
        "latency": LATENCY,
        "about": {
            "config": {"data": {"name": "noise", "mean": [0.5]}, "comment": "<!-- $title -->"},
            "versions": {"python": "3.11"},
        },
    }
    return page.page_document(ROWS, FAMILY, **{**options, **changes})


# --- the data --------------------------------------------------------------------------------


def test_networks_are_distinct_and_in_order_with_their_depth_and_their_latency():
    entries = page.network_entries([*ROWS, ROWS[0]], FAMILY, LATENCY)
    found = [(e["ratio"], e["depth"]) for e in entries]
    assert found == [(0.25, 14), (0.5, 12), (0.5, 14), (1.0, 12), (1.0, 14)]
    assert entries[-1]["latency"] == {"jax, batch 1": {"p50_ms": 3.0, "p90_ms": 6.0}}
    assert "latency" not in entries[0]
    assert [e["shown"] for e in entries[2:4]] == ["2 / 4", "8, 1 block skipped"]
    with refused("at least one evaluated network"):
        page.page_document([], FAMILY, heading=("", ""), trained_range=(0.5, 1))


def test_where_streams_are_narrow_too_channels_are_not_called_hidden():
    family = cifar_resnet.hypernetwork(SPEC, range(6), make_inr("grid"), streams=True)
    narrow = GridRow(0.5, (2, 2, 4, 4, 8, 8, 2, 4, 8), 1, 2, 0.5, True, interval=(0.4, 0.6))
    found = page.page_document([narrow], family, heading=("", ""), trained_range=(0.5, 1.0))
    assert (found["channels"], found["networks"][0]["interval"]) == ("channels", [0.4, 0.6])
    assert document()["channels"] == "hidden channels"


def test_a_network_that_is_no_resnet_has_a_page_too():
    spec = linen.LinenSpec("mlp", '{"widths": [8, 4]}', num_classes=10, image_size=8, channels=1)
    family = linen.hypernetwork(spec, make_inr("grid"))
    rows = [GridRow(ratio, (4, 2), 1, 2, 0.5, True) for ratio in (1.0, 0.5)]
    found = page.page_document(rows, family, heading=("", ""), trained_range=(0.5, 1.0))
    assert [(e["depth"], e["shown"]) for e in found["networks"]] == [(3, "4 / 2")]
    assert found["channels"] == "channels"
    assert found["full"]["params"] == 64 * 8 + 8 + 8 * 4 + 4 + 4 * 10 + 10


def test_what_the_data_hold_cannot_end_their_element():
    text = page.render(document())
    assert text.count("</script>") == 2 and "<b>noise" not in text and "<!--" not in text
    embedded = text.split('id="data">')[1].split("</script>")[0]
    assert json.loads(embedded) == json.loads(json.dumps(document()))
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text


def test_a_page_is_replaced_only_by_a_complete_one(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    page.write_page(path, document())
    before = path.read_bytes()
    monkeypatch.setattr(page, "render", lambda document: "\ud800")  # cannot be encoded
    with pytest.raises(UnicodeEncodeError):
        page.write_page(path, document())
    assert path.read_bytes() == before


def test_a_damaged_latency_file_is_named(tmp_path):
    path = tmp_path / "latency.json"
    assert page.read_latency(path) is None
    path.write_text(json.dumps(LATENCY))
    assert page.read_latency(path) == LATENCY
    for text in ("{", "[]", '{"rows": [{"widths": [1]}]}'):
        path.write_text(text)
        with pytest.raises(UsageError, match="latency.json must be what neumeta"):
            page.read_latency(path)


# --- in a browser ----------------------------------------------------------------------------

BROWSER_FLAGS = "headless no-sandbox disable-gpu disable-quic no-first-run disable-sync"
BROWSER_FLAGS += " disable-background-networking disable-component-update"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs Chromium and its driver (Debian: chromium, chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*BROWSER_FLAGS.split(), f"user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


def open_page(browser, path, scheme="light", **changes):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    page.write_page(path, document(**changes))
    browser.get(pathlib.Path(path).as_uri())

    def text(name):
        return browser.find_element("id", name).text

    return text


def press(browser, name, *keys):
    browser.find_element("id", name).send_keys(*keys)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_sliders_change_the_numbers_and_nothing_goes_wrong(browser, tmp_path, scheme):
    from selenium.webdriver.common.keys import Keys

    text = open_page(browser, tmp_path / "report.html", scheme)
    color = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(c) for c in color[4:-1].split(","))
    assert brightness > 600 if scheme == "light" else brightness < 150
    assert text("title") == "ResNet14 on </script><b>noise</b>"
    assert (text("accuracy"), text("latency")) == ("75.00 %", "3.00 ms")
    assert text("params") == f"{SPEC.num_params:,}"
    assert (text("int8"), text("int8-note")) == ("70.00 %", "−5.00 points")
    press(browser, "width", Keys.PAGE_DOWN * 4, Keys.ARROW_LEFT)
    assert text("width-value") == "0.59" and text("accuracy") == "62.50 %"
    assert text("int8-note") == "−5.00 points, at width 1"  # the nearest that was evaluated
    assert text("latency") == "1.50 ms" and "width ratio 0.5" in text("nearest")
    press(browser, "width", Keys.HOME)
    assert text("accuracy") == "25.00 %" and "never trained" in text("nearest")
    assert text("latency-note") == "p90 3.00 ms, at width 0.5"  # the nearest that was measured
    press(browser, "depth", Keys.ARROW_LEFT)
    assert text("depth-value") == "12" and text("accuracy") == "37.50 %"
    assert text("latency-note") == "not measured at this depth"
    assert browser.get_log("browser") == []


def test_the_points_of_the_front_are_reached_by_keyboard(browser, tmp_path):
    from selenium.webdriver.common.keys import Keys

    text = open_page(browser, tmp_path / "report.html")
    point = browser.find_element("css selector", "#front .point[tabindex='0']")
    point.send_keys(Keys.HOME)  # the cheapest network
    tip = browser.find_element("css selector", "#front .tip")
    assert tip.is_displayed() and "37.50 %" in tip.text
    assert "on the front" in browser.switch_to.active_element.get_attribute("aria-label")
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert "25.00 %" in tip.text
    label = browser.switch_to.active_element.get_attribute("aria-label")
    assert "25.00 %" in label and "on the front" not in label
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    found = [text(name) for name in ("accuracy", "width-value", "depth-value")]
    assert found == ["25.00 %", "0.25", "14"]
    browser.find_element("css selector", "#cost input[value='latency']").click()
    assert len(browser.find_elements("css selector", "#front .point")) == 2  # those measured
    assert browser.get_log("browser") == []


def test_a_page_of_one_network_and_no_extras_has_no_empty_parts(browser, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROWS", [dataclasses.replace(ROWS[0], int8_accuracy=None)])
    without = {"latency": None, "teacher_accuracy": None}
    text = open_page(browser, tmp_path / "report.html", **without)
    assert text("accuracy") == "75.00 %"
    for name in ("depth-row", "latency-tile", "measure-row", "int8-tile"):
        assert not browser.find_element("id", name).is_displayed()
    assert len(browser.find_elements("css selector", "#over-width .point")) == 1
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("width", [1200, 400])
def test_nothing_is_wider_than_the_window(browser, tmp_path, width):
    browser.set_window_size(width, 900)
    open_page(browser, tmp_path / "report.html")
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
