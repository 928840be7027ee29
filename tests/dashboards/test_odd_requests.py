"""Requests that no form of ours makes: too long, too many, for what is not there, while the store is away."""

from __future__ import annotations

from pathlib import Path

from dashboards.app import FOLDER
from tests.dashboards.fleets import say
from tests.dashboards.test_actions import csrf, operator, password_file, settings, sign_in  # noqa: F401 - fixtures


def test_browsers_find_an_icon_where_they_look_unasked(client):
    answer = client.get("/favicon.ico")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/svg+xml"
    assert answer.content == (FOLDER / "static" / "icon.svg").read_bytes()


def test_a_page_number_of_any_length_is_a_page(client):
    assert client.get("/?page=" + "000001" + "9" * 5000).status_code == 200


def test_a_form_that_is_too_large_is_refused_before_it_is_read(client):
    answer = client.post("/login", data={"password": "x" * 100_000})
    assert answer.status_code == 413
    parts = (b"password=" for _ in range(2))  # no length said
    assert client.post("/login", content=parts, headers={"content-type": "application/x-www-form-urlencoded"}).status_code == 413


def test_what_is_not_there_is_not_kept_for_a_year(client):
    assert client.get("/static/nothing.js").headers["cache-control"] == "no-store"
    assert "immutable" in client.get("/static/dashboard.js").headers["cache-control"]


def test_an_action_while_the_store_is_away_says_that_nothing_was_done(operator, store):  # noqa: F811
    token = csrf(operator)
    path = Path(str(store.url.database))
    store.close()
    path.rename(f"{path}.away")
    answer = operator.post("/devices/kitchen/order", data={"csrf": token, "name": "pause"})
    assert answer.status_code == 503
    assert "refresh" not in answer.headers  # would ask for the form's address
    assert "nothing was done" in answer.text


def test_titles_say_what_happened(client):
    assert "<h1>Not found</h1>" in client.get("/nowhere").text
    assert "<h1>Not done</h1>" in client.get("/rejections/1/payload").text


def test_the_spool_that_does_not_balance_is_named_in_words(client, store):
    say(store, "attic", 60)
    table = client.get("/devices/attic").text.split('data-fragment="ledger"')[1].split("</table>")[0]
    assert "unbalanced</span></th>" in table


def test_an_address_or_form_that_makes_no_sense_gets_a_page_too(client):
    for answer in (client.get("/rejections/abc/payload"), client.post("/login", data={"password": "x" * 2000})):
        assert answer.status_code == 422
        assert "<h1>Not done</h1>" in answer.text
        assert "x" * 100 not in answer.text  # a password is not sent back
