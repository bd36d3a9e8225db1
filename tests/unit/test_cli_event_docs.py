"""`unlost event docs`: an AsyncAPI document that the official schema accepts, and a page that needs nothing else."""

from __future__ import annotations

import json
import re
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal

import jsonschema
import msgspec
import pytest
from cli_kit import Shell

from unlost import App, Command, Event, Sensitive, Service, Topic, UsageError
from unlost.ops.event_docs import document_bytes, event_document, write_docs
from unlost.ops.event_page import event_page

OFFICIAL = json.loads((Path(__file__).parent / "asyncapi-3.1.0.json").read_text())


class Card(msgspec.Struct, tag="card"):
    last_four: Sensitive[str]


class Voucher(msgspec.Struct, tag="voucher"):
    code: str = msgspec.field(default="none")


class Place(msgspec.Struct, array_like=True):
    x: float
    y: float


class OrderBilled(Event, key="order_id", topic="shop", version=3):
    """An order was billed.

    With <b>markup</b> & more."""

    order_id: str = msgspec.field(name="orderId")
    how: Card | Voucher
    size: Literal["s", "l"]
    at: datetime
    place: Place
    pair: tuple[int, str]
    email: Sensitive[str] = "somebody@example.org"
    tags: dict[str, list[int]] = {}  # noqa: RUF012


class BilledSize(Event, view_of="shop.OrderBilled"):
    size: str


class BilledPlace(Event, view_of="shop.OrderBilled"):
    place: Place


class OrderOfOthers(Event, view_of="elsewhere.OrderPlaced", key="order_id"):
    order_id: str


class PrintBill(Command, queue="bills"):
    number: int


CLASSES: list[type[Event]] = [PrintBill, OrderOfOthers, OrderBilled, BilledSize, BilledPlace]


def shop() -> App:
    billing, statistics = Service("billing"), Service("statistics", guarantee="effectively-once")

    @billing.on(OrderBilled)
    async def bill(event: OrderBilled) -> None: ...

    @billing.on(PrintBill)
    async def print_bill(command: PrintBill) -> None: ...

    @statistics.on(BilledSize)
    async def count_sizes(event: BilledSize) -> None: ...

    @statistics.on(OrderOfOthers)
    async def others(event: OrderOfOthers) -> None: ...

    return App(billing, statistics, topics=[Topic("shop", partitions=3, retention="30d")])


def resolved(document: Any, ref: str) -> Any:
    for part in ref.removeprefix("#/").split("/"):
        document = document[part]
    return document


def refs(thing: Any) -> list[str]:
    if isinstance(thing, list):
        return [ref for part in thing for ref in refs(part)]
    if isinstance(thing, dict):
        own = [thing["$ref"]] if "$ref" in thing else []
        return own + [ref for part in thing.values() for ref in refs(part)]
    return []


def test_the_official_schema_accepts_the_document_and_every_reference_leads_somewhere() -> None:
    document = json.loads(document_bytes(event_document(shop(), CLASSES)))
    jsonschema.Draft7Validator(OFFICIAL).validate(document)
    found = refs(document)
    assert len(found) > 20
    for ref in found:
        assert resolved(document, ref)
    broken = document | {"channels": {"shop": {"adress": "shop"}}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft7Validator(OFFICIAL).validate(broken)


def test_the_payload_schema_takes_what_is_published_and_refuses_other_data() -> None:
    document = json.loads(document_bytes(event_document(shop(), CLASSES)))
    event = OrderBilled(
        order_id="A1",
        how=Voucher(),
        size="s",
        at=datetime(2026, 1, 2),
        place=Place(1, 2),
        pair=(1, "b"),
        tags={"a": [1]},
    )
    payload = document["components"]["messages"]["shop.OrderBilled"]["payload"]
    validator = jsonschema.Draft7Validator(document | payload)
    sent = json.loads(msgspec.json.encode(event))
    validator.validate(sent)
    for wrong in ({"size": "m"}, {"pair": ["b", 1]}, {"pair": [1, "b", 2]}, {"orderId": 1}, {"how": {"type": "cash"}}):
        assert not validator.is_valid(sent | wrong), wrong


def test_channels_messages_and_who_receives() -> None:
    document = event_document(shop(), CLASSES)
    channels = document["channels"]
    assert {name: (c["x-unlost"]["kind"], list(c["messages"])) for name, c in channels.items()} == {
        "bills": ("queue", ["bills.PrintBill"]),
        "elsewhere": ("topic", ["elsewhere.OrderPlaced"]),
        "shop": ("topic", ["shop.OrderBilled"]),
    }
    assert channels["shop"]["bindings"]["kafka"]["partitions"] == 3 and "bindings" not in channels["bills"]
    operations = document["operations"]
    assert {operation["action"] for operation in operations.values()} == {"receive"}, "who publishes is not known"
    assert list(operations) == [
        "billing.receive.bills", "billing.receive.shop", "statistics.receive.elsewhere", "statistics.receive.shop",
    ]  # fmt: skip
    (by_view,) = operations["statistics.receive.shop"]["x-unlost"]["handlers"]
    assert by_view == {
        "type": "shop.OrderBilled", "handler": "count_sizes", "reads": "#/components/schemas/BilledSize", "view": True,
        "guarantee": "effectively-once", "on_dead": "park",
    }  # fmt: skip
    message = document["components"]["messages"]["shop.OrderBilled"]
    assert (message["x-unlost"]["version"], message["x-unlost"]["key"]) == (3, "orderId")
    assert message["headers"]["properties"] == {
        "ce_type": {"const": "shop.OrderBilled"}, "ce_unlostversion": {"const": "3"},
    }  # fmt: skip
    only_views = document["components"]["messages"]["elsewhere.OrderPlaced"]
    assert only_views["payload"] == {"allOf": [{"$ref": "#/components/schemas/OrderOfOthers"}]}
    assert "Not in this code" in only_views["description"]


def test_the_headers_are_those_that_are_written() -> None:
    from unlost.events import seal
    from unlost.events.codec import to_headers

    document = event_document(shop(), CLASSES)
    sealed = seal(PrintBill(number=1), source="web", now=1_700_000_000_000_000)
    full = msgspec.structs.replace(
        sealed, eventversion=2, subject="1", correlationid="a", causationid="b", partitionkey="c",
        traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", tracestate="x=y",
    )  # fmt: skip
    said = document["components"]["messageTraits"]["cloudevents"]["headers"]
    written = {name for name, _ in to_headers(full)[0]}
    assert written == said["properties"].keys()
    assert set(said["required"]) <= {name for name, _ in to_headers(sealed)[0]}


def test_sensitive_fields_are_marked_and_their_defaults_stay_away() -> None:
    document = event_document(shop(), CLASSES)
    fields = document["components"]["schemas"]["OrderBilled"]["properties"]
    assert {name for name, field in fields.items() if field.get("x-unlost-sensitive")} == {"email", "how"}
    assert document["components"]["messages"]["shop.OrderBilled"]["x-unlost"]["sensitive"] == ["email", "how"]
    assert b"somebody@example.org" not in document_bytes(document)
    assert "somebody@example.org" not in event_page(document)


def test_the_same_code_gives_the_same_bytes_in_whatever_order_it_is_imported() -> None:
    one = event_document(shop(), CLASSES)
    again = event_document(shop(), CLASSES)
    assert document_bytes(one) == document_bytes(again)
    assert event_page(one) == event_page(again)


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        said = dict(attrs)
        assert tag not in ("script", "link", "img", "iframe", "object"), tag
        assert not {"src", "style"} & said.keys() and not any(name.startswith("on") for name in said)
        if "id" in said:
            self.ids.append(said["id"] or "")
        if "href" in said:
            self.links.append(said["href"] or "")
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_needs_nothing_else_and_its_links_lead_somewhere() -> None:
    text = event_page(event_document(shop(), CLASSES))
    page = Page(text)
    assert page.open == [] and len(page.ids) == len(set(page.ids))
    assert page.links and {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert "://" not in text and "@import" not in text and "url(" not in text
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    said = "".join(page.texts)
    for words in (
        "shop.OrderBilled",
        "sensitive",
        "version 3",
        "count_sizes",
        "With <b>markup</b> & more",
        "nobody in this App",
    ):
        assert words in said, words


def test_whatever_a_text_says_it_stays_text() -> None:
    document = event_document(shop(), CLASSES)
    evil = "</p><script>alert(1)</script>\"' \x1b\u202e"
    document["info"]["title"] = evil
    document["components"]["messages"]["shop.OrderBilled"]["description"] = evil
    document["components"]["schemas"]["BilledSize"]["properties"][evil] = {"type": "string", "default": evil}
    text = event_page(document)
    Page(text)  # refuses a script
    assert "\x1b" not in text and "\u202e" not in text and "&lt;script&gt;" in text


def test_two_classes_for_one_type_are_refused() -> None:
    class Other(Event, topic="shop", type="shop.OrderBilled"):
        x: int

    with pytest.raises(UsageError, match=r"UL1368.*one class for a wire type") as caught:
        event_document(App(), [OrderBilled, Other])
    assert "Other" in caught.value.found and "view" in caught.value.fix


def test_two_classes_of_one_name_have_each_their_own_schema() -> None:
    def another() -> type[Event]:
        class PrintBill(Command, queue="old-bills"):
            text: str

        return PrintBill

    document = event_document(App(), [PrintBill, another()])
    payloads = {type: m["payload"]["$ref"] for type, m in document["components"]["messages"].items()}
    assert set(payloads) == {"bills.PrintBill", "old-bills.PrintBill"} and len(set(payloads.values())) == 2
    for type, field in (("bills.PrintBill", "number"), ("old-bills.PrintBill", "text")):
        assert list(resolved(document, payloads[type])["properties"]) == [field]
    jsonschema.Draft7Validator(OFFICIAL).validate(json.loads(document_bytes(document)))


def test_events_of_pydantic_have_their_schema_too() -> None:
    import pydantic

    from unlost.pydantic import Event as ModelEvent

    class Line(pydantic.BaseModel):
        sku: str
        cents: int = pydantic.Field(ge=0)

    class OrderPacked(ModelEvent, key="order_id"):
        """It is in its box."""

        order_id: str = pydantic.Field(serialization_alias="orderId", validation_alias="orderId")
        lines: list[Line]
        address: Sensitive[str] = "Elm Street"

    document = event_document(App(), [OrderPacked])
    jsonschema.Draft7Validator(OFFICIAL).validate(json.loads(document_bytes(document)))
    message = document["components"]["messages"]["order.OrderPacked"]
    assert (message["x-unlost"]["key"], message["description"]) == ("orderId", "It is in its box.")
    schema = resolved(document, message["payload"]["$ref"])
    assert schema["required"] == ["orderId", "lines"] and schema["properties"]["address"]["x-unlost-sensitive"]
    assert b"Elm Street" not in document_bytes(document)
    valid = jsonschema.Draft7Validator(document | message["payload"]).is_valid
    assert valid({"orderId": "A1", "lines": [{"sku": "x", "cents": 1}]})
    assert not valid({"orderId": "A1", "lines": [{"sku": "x", "cents": -1}]})


# --- the command, in processes of its own: it takes all classes that it finds


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    found = Shell(tmp_path)
    found.write("pyproject.toml", '[project]\nname = "web-shop"\nversion = "2.1"\n')
    return found


def test_the_command_writes_both_files_and_only_what_has_changed(shell: Shell) -> None:
    first = shell.ok("event", "docs", "--app", "shop")
    assert first.out.count("written") == 2 and "2 types on 1 channel" in first.out
    folder = shell.folder / "event-docs"
    document = json.loads((folder / "asyncapi.json").read_text())
    jsonschema.Draft7Validator(OFFICIAL).validate(document)
    assert (document["info"]["title"], document["info"]["version"]) == ("web-shop", "2.1")
    assert list(document["components"]["messages"]) == ["order.OrderPlaced", "order.OrderShipped"]
    assert Page((folder / "index.html").read_text()).ids
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    assert set(before) == {"asyncapi.json", "index.html"}
    again = shell.ok("event", "docs", "--app", "shop", PYTHONHASHSEED="7")
    assert again.out.count("says the same already") == 2
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()} == before


def test_json_says_where_the_files_are(shell: Shell) -> None:
    said = shell("event", "docs", "--app", "shop", "--out", "there", "--json").json
    assert said["schema"] == "unlost.event-docs/1" and (said["types"], said["channels"]) == (2, 1)
    assert said["changed"] == [said["document"], said["page"]] == ["there/asyncapi.json", "there/index.html"]
    assert shell("event", "docs", "--app", "shop", "--out", "there", "--json").json["changed"] == []


@pytest.mark.parametrize("name", ["index.html", "asyncapi.json"])
def test_a_file_of_somebody_else_is_left_alone(shell: Shell, name: str) -> None:
    mine = shell.write(f"site/{name}", "mine")
    result = shell("event", "docs", "--app", "shop", "--out", "site")
    assert result.code == 2 and "UL1369" in result.err and name in result.err
    assert mine.read_text() == "mine" and [path.name for path in mine.parent.iterdir()] == [name]


def test_a_folder_that_cannot_be_written(shell: Shell) -> None:
    shell.write("file", "")
    result = shell("event", "docs", "--app", "shop", "--out", "file/docs")
    assert result.code == 2 and "UL1367" in result.err and "--out" in result.err
    with pytest.raises(UsageError, match="UL1367"):
        write_docs(shell.folder / "file", event_document(App(), []))


def test_an_app_without_events(shell: Shell) -> None:
    shell.write("empty.py", "from unlost import App\n\napp = App()\n")
    assert "0 types on 0 channels" in shell.ok("event", "docs", "--app", "empty", "--out", "d").out
    jsonschema.Draft7Validator(OFFICIAL).validate(json.loads((shell.folder / "d" / "asyncapi.json").read_text()))
    assert re.search(r"<title>Events of web-shop 2\.1</title>", (shell.folder / "d" / "index.html").read_text())
