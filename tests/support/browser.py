"""Debian's Chromium on the Prefect UI, which may reach nothing but this machine."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException, WebDriverException
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
SCREENSHOTS = os.environ.get("SCREENSHOTS_FOLDER")
ARGUMENTS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1280,900",
    "--force-color-profile=srgb", "--disable-background-networking", "--no-first-run",
    # Every other name is unknown to this browser.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip
# The field that belongs to a title: what its label names, or the first control below the label.
FIND_FIELD = """
const wanted = arguments[0];
const label = [...document.querySelectorAll('label, legend, span, p')].find(
  (each) => each.textContent.replace(' (Optional)', '').trim() === wanted && each.offsetParent !== null);
if (!label) return null;
if (label.htmlFor && document.getElementById(label.htmlFor)) return document.getElementById(label.htmlFor);
const controls = [...document.querySelectorAll('input, textarea')].filter((each) => each.offsetParent !== null);
return controls.find((each) => label.compareDocumentPosition(each) & Node.DOCUMENT_POSITION_FOLLOWING);
"""
# The button with a text that follows a title, or the first one on the page.
FIND_BUTTON = """
const [text, title] = arguments;
const anchor = title && [...document.querySelectorAll('label, legend, span, p')].find(
  (each) => each.textContent.replace(' (Optional)', '').trim() === title && each.offsetParent !== null);
if (title && !anchor) return null;
return [...document.querySelectorAll('button, a, [role=option], [role=tab], [role=menuitem]')].find((each) =>
  each.textContent.trim() === text && each.offsetParent !== null &&
  (!anchor || anchor.compareDocumentPosition(each) & Node.DOCUMENT_POSITION_FOLLOWING)) || null;
"""


class Browser:
    """A window on the Prefect UI that finds things by the words that a person reads."""

    def __init__(self, driver: Any, address: str) -> None:
        self.driver = driver
        self.address = address

    @property
    def text(self) -> str:
        """What the page shows."""
        return str(self.driver.find_element(By.TAG_NAME, "body").text)

    @property
    def place(self) -> str:
        """Path of the page."""
        return str(self.driver.current_url).removeprefix(self.address)

    def open(self, path: str, words: str) -> None:
        """Open a page and wait for words on it."""
        self.driver.get(self.address + path)
        self.wait(lambda: words in self.text, f"{words!r} on {path}")

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
        """Return the first true value of a condition about a page that is being built."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if value := condition():
                    return value
            except StaleElementReferenceException:
                pass
            time.sleep(0.2)
        raise TimeoutError(f"{what} took more than {seconds} s. The page {self.place}:\n{self.text[-3000:]}")

    def find_field(self, title: str) -> WebElement:
        """Return the input below a title."""
        return self.wait(lambda: self.driver.execute_script(FIND_FIELD, title), f"the field {title!r}")

    def fill(self, title: str, value: str) -> None:
        """Paste a value in place of the one that is there. A page that is still being built may lose it, then again."""

        def paste() -> bool:
            field = self.find_field(title)
            self._show(field)
            field.send_keys(Keys.CONTROL, "a")
            field.send_keys(Keys.DELETE)
            self.driver.execute_cdp_cmd("Input.insertText", {"text": value})
            time.sleep(0.5)
            return self.find_field(title).get_attribute("value") == value

        self.wait(paste, f"to fill {title!r} with {value!r}")

    def fill_all(self, values: dict[str, str]) -> None:
        """Fill several fields, until all of them hold their values together."""

        def keep() -> bool:
            for title, value in values.items():
                self.fill(title, value)
            time.sleep(0.5)
            return all(self.find_field(title).get_attribute("value") == value for title, value in values.items())

        self.wait(keep, f"to fill {list(values)}")

    def click(self, text: str, below: str | None = None) -> None:
        """Click the button, link, tab or choice with a text, the first one below a title where that is given."""
        button = self.wait(lambda: self.driver.execute_script(FIND_BUTTON, text, below), f"the button {text!r}")
        self._show(button)
        button.click()

    def keep_screenshot(self, name: str) -> None:
        """Keep what the window shows as a small picture, if a folder for it is given."""
        if SCREENSHOTS:
            time.sleep(0.5)
            path = Path(SCREENSHOTS) / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            self.driver.save_screenshot(str(path))
            from PIL import Image

            Image.open(path).convert("P", palette=Image.Palette.ADAPTIVE, colors=64).save(path, optimize=True)

    def _show(self, element: WebElement) -> None:
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)


@contextmanager
def open_browser(address: str) -> Iterator[Browser]:
    """Open a window on a Prefect server until the block ends."""
    options = Options()
    options.binary_location = str(BROWSER)
    for argument in ARGUMENTS:
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        driver.set_page_load_timeout(120)
        yield Browser(driver, address)
    finally:
        try:
            driver.quit()
        except WebDriverException:
            driver.service.stop()
