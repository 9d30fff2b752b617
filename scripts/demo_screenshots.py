"""Drive the web demo in a real browser, check what a user would see, and save pictures of it.

    python scripts/demo_screenshots.py --save_dir out/quickstart

Needs Chromium with its driver and the package selenium, and weights that chat (full_sft), think (reason) and
call tools (agent): `python scripts/quickstart.py --stages all` leaves them in out/quickstart. Streaming, Stop
and Answer again are tried on random weights, which go on for long. Pictures go to docs/demo/.
"""

import argparse
import contextlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.web_texts import TEXTS


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--save_dir", type=Path, default=ROOT / "out" / "quickstart", help="folder of the weights"
    )
    parser.add_argument(
        "--pictures", type=Path, default=ROOT / "docs" / "demo", help="folder of the pictures"
    )
    parser.add_argument(
        "--width", default="256", help="of the weights, as in their file names (default: 256)"
    )
    return parser.parse_args(argv)


class Browser:
    """A page of the demo, by what is written on it."""

    def __init__(self, url: str, pictures: Path):
        from selenium import webdriver

        self.profile = tempfile.mkdtemp()
        options = webdriver.ChromeOptions()
        for flag in (
            "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
            "--disable-background-networking --disable-component-update --disable-dev-shm-usage"
        ).split():
            options.add_argument(flag)
        options.add_argument(f"--user-data-dir={self.profile}")
        options.add_argument("--window-size=1280,900")
        driver = shutil.which("chromedriver")  # named, selenium does not look for one in the network
        service = webdriver.ChromeService(driver) if driver else None
        self.driver, self.pictures = webdriver.Chrome(options=options, service=service), pictures
        self.driver.get(url)
        self.language = "English"

    def close(self):
        self.driver.quit()
        shutil.rmtree(self.profile, ignore_errors=True)

    def find(self, xpath: str, seconds: float = 30):
        """The first visible element, waiting for it."""
        end = time.monotonic() + seconds
        while True:
            found = [e for e in self.driver.find_elements("xpath", xpath) if e.is_displayed()]
            if found:
                return found[0]
            if time.monotonic() > end:
                self.picture("failed")
                raise SystemExit(f"not on the page: {xpath} (see failed.png)")
            time.sleep(0.1)

    def gone(self, xpath: str, seconds: float = 60):
        end = time.monotonic() + seconds
        while any(e.is_displayed() for e in self.driver.find_elements("xpath", xpath)):
            if time.monotonic() > end:
                raise SystemExit(f"still on the page: {xpath}")
            time.sleep(0.05)

    def text(self, name: str) -> str:
        return TEXTS[self.language][name]

    def button(self, name: str, seconds: float = 30):
        return self.find(f"//button[contains(., '{self.text(name)}')]", seconds)

    def choose(self, label: str, *values: str):
        """Type values into a select box."""
        from selenium.webdriver.common.keys import Keys

        kinds = "@data-testid='stSelectbox' or @data-testid='stMultiSelect'"
        box = self.find(f"//div[{kinds}][contains(., '{label}')]//input")
        for value in values:
            box.send_keys(value)
            time.sleep(0.5)
            box.send_keys(Keys.ENTER)
            time.sleep(0.7)
        box.send_keys(Keys.ESCAPE)
        time.sleep(0.7)

    def start(self, weights: str):
        """A new conversation with these weights."""
        time.sleep(1)
        self.button("new").click()
        time.sleep(1)
        for _ in range(3):  # typed while the page was drawn anew, it may be lost
            self.choose(self.text("weights"), weights)
            if self.driver.find_elements("xpath", f"//h2[contains(., '{weights}')]"):
                return
            time.sleep(1)
        self.find(f"//h2[contains(., '{weights}')]")

    def slide(self, name: str, where: str):
        """A slider to its HOME or END."""
        from selenium.webdriver import ActionChains
        from selenium.webdriver.common.keys import Keys

        slider = f"//*[@data-testid='stSlider']//input[@aria-label='{self.text(name)}']"
        element = self.driver.find_element("xpath", slider)
        self.driver.execute_script("arguments[0].scrollIntoView(); arguments[0].focus()", element)
        ActionChains(self.driver).send_keys(getattr(Keys, where)).perform()
        time.sleep(1)

    def ask(self, question: str, wait: bool = True):
        from selenium.webdriver.common.keys import Keys

        box = self.find("//*[@data-testid='stChatInput']//textarea")
        box.send_keys(question)
        box.send_keys(Keys.ENTER)
        self.button("stop")
        if wait:
            self.finished()

    def paste(self, text: str):
        """A long question at once, into the page's own way of noticing it."""
        from selenium.webdriver.common.keys import Keys

        box = self.find("//*[@data-testid='stChatInput']//textarea")
        self.driver.execute_script(
            "Object.getOwnPropertyDescriptor(HTMLTextAreaElement.prototype, 'value').set.call("
            "arguments[0], arguments[1]); arguments[0].dispatchEvent(new Event('input', {bubbles: true}))",
            box,
            text,
        )
        time.sleep(0.5)
        box.send_keys(Keys.ENTER)

    def finished(self):
        self.button("again", 120)
        time.sleep(0.5)

    def answer(self) -> str:
        """Text of the last answer; "" when the last thing is a question."""
        last = self.driver.find_elements("xpath", "//*[@data-testid='stChatMessage']")[-1]
        return (
            "" if last.find_elements("xpath", ".//*[@data-testid='stChatMessageAvatarUser']") else last.text
        )

    def check(self, holds: bool, what: str):
        print(f"{'ok  ' if holds else 'FAIL'} {what}", flush=True)
        if not holds:
            self.picture("failed")
            raise SystemExit(f"the last answer is {self.answer()!r} (see failed.png)")

    def picture(self, name: str):
        self.pictures.mkdir(parents=True, exist_ok=True)
        self.driver.save_screenshot(str(self.pictures / f"{name}.png"))


@contextlib.contextmanager
def demo(save_dir: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", str(ROOT / "scripts" / "web_demo.py")]
    command += ["--server.headless", "true", "--server.port", str(port), "--", "--save_dir", save_dir.name]
    process = subprocess.Popen(
        command, cwd=save_dir.parent
    )  # so that pictures show no folder of this machine
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def walk(browser: Browser, width: str):
    """What a user would do, in English."""
    browser.slide("temperature", "HOME")  # greedy: the pictures are the same every time
    browser.start(f"full_sft_{width}")
    browser.ask("What is the capital of France?")
    browser.check("Paris" in browser.answer(), "a question is answered")
    browser.ask("日本的首都是哪里？")
    browser.picture("chat")

    browser.start(f"reason_{width}")
    browser.find(f"//label[contains(., '{browser.text('thinking')}')]").click()
    time.sleep(1)
    browser.ask("What is 17 + 25 + 38?")
    browser.check(browser.text("thoughts") in browser.answer(), "thoughts are shown apart")
    browser.find(f"//summary[contains(., '{browser.text('thoughts')}')]").click()
    time.sleep(0.7)
    browser.picture("thinking")
    browser.find(f"//label[contains(., '{browser.text('thinking')}')]").click()

    browser.start(f"agent_{width}")
    browser.choose(browser.text("tools"), "calculate_math", "random_number", "text_length")
    browser.ask('How much is 74 - 33, and then how many characters are in "egg".')
    answer = browser.answer()
    browser.check(
        all(part in answer for part in ("calculate_math", '{"result": 41}', "text_length", "41 and 3")),
        "two tools are called one after the other, their results shown and told",
    )
    browser.driver.set_window_size(1280, 1180)
    time.sleep(1)
    browser.picture("tools")
    browser.driver.set_window_size(1280, 900)

    browser.find("//*[@data-testid='stMultiSelect']//*[@aria-label='Clear all']").click()
    browser.start("random")
    browser.slide("length", "END")
    browser.slide("temperature", "END")
    browser.ask("Go on", wait=False)
    browser.find("(//*[@data-testid='stChatMessage'])[last()][contains(., '▌')]")
    lengths = set()
    for _ in range(20):
        lengths.add(len(browser.answer()))
        time.sleep(0.05)
    browser.check(len(lengths) > 3, f"the answer grows while one looks ({len(lengths)} lengths)")
    browser.button("stop").click()
    browser.finished()
    stopped = browser.answer()
    time.sleep(1)
    browser.check(
        browser.answer() == stopped, f"Stop ends it, and what was said stays ({len(stopped)} characters)"
    )
    browser.button("again").click()
    browser.find("(//*[@data-testid='stChatMessage'])[last()][contains(., '▌')]")
    time.sleep(2)
    browser.button("stop").click()
    browser.finished()
    browser.check(
        len(browser.answer()) > 20 and browser.answer() != stopped, "Answer again gives another answer"
    )
    browser.paste("天地玄黄" * 7000)
    browser.find("(//*[@data-testid='stChatMessage'])[last()][contains(., ' s …')]", 60)
    started = time.monotonic()
    browser.button("stop").click()
    browser.finished()
    seconds = time.monotonic() - started
    browser.check(seconds < 8, f"Stop works while a long question is being read ({seconds:.1f} s)")


def chinese(browser: Browser, width: str):
    for _ in range(2):  # pressed again, it stays
        browser.find("//button[contains(., '中文')]").click()
        time.sleep(1)
    browser.language = "中文"
    browser.start(f"full_sft_{width}")
    browser.slide("temperature", "HOME")
    browser.ask("法国的首都是哪里？")
    browser.check("巴黎" in browser.answer(), "the same in Chinese")
    browser.picture("chat_zh")
    browser.find(f"//a[contains(., '{browser.text('training')}')]").click()
    browser.find("//*[@data-testid='stMetric']")
    time.sleep(2)
    browser.picture("training_zh")
    browser.find(f"//a[contains(., '{browser.text('chat')}')]").click()
    browser.find(f"//h2[contains(., 'full_sft_{width}')] | //*[contains(., '巴黎')]")
    slider = browser.find("//*[@data-testid='stSlider']//*[@data-testid='stSliderThumbValue']")
    browser.check(float(slider.text) == 0, "back in the chat, its settings and what was said are still there")


def main(args):
    from scripts.bench_serve import write_weights

    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "out"
        folder.mkdir()
        for path in args.save_dir.glob("*"):
            if path.name.endswith(("_log.jsonl", "_samples.jsonl", f"_{args.width}.pth")):
                shutil.copy2(path, folder)
        write_weights(argparse.Namespace(preset="minimind2-small", seed=0), folder)
        look(args, folder)


def look(args, folder: Path):
    with demo(folder) as url:
        browser = Browser(url, args.pictures)
        try:
            browser.find("//*[@data-testid='stChatInput']//textarea")
            walk(browser, args.width)
            chinese(browser, args.width)
        finally:
            browser.close()
    print(f"pictures: {args.pictures}")


if __name__ == "__main__":
    main(parse_args())
