"""Prices of many countries: kept as they were given, dropped for a reason that is counted."""

from __future__ import annotations

import sys
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sda_core.data.cleaning import clean_price, read_price
from sda_core.data.prices import CODES, SIGNS, is_price
from sda_core.dropped_values import PRICE_REASONS

PRICES = """
CHF 12.50|12,50 kr|9,99 zł|100 ₽|R$ 5,00|₩12,000|₺100|SEK 99|99 PLN|12.50 元|A$ 12.50
HK$100|US$12.99|US $12.99|CA$ 5|C$5|AU$12|NZ$ 12|NT$1,200|S$12.90|MX$199|CN¥88
JP¥1,200|¥1,200|￥1200|1,200円|1200 日元|₹1,00,000|Rs. 1,00,000|Rs 499|INR 499.00|₹ 499/-
1 299,00 kr|1 299 Kč|1 299,90 zł.|1'299.00|CHF 1'299.00|1’299.–|CHF 12.–|12,-|12,- €
12,– €|Fr. 12.-|12:-|249:- kr|kr 249,-|kr. 249|249 kr.|12.990 Ft|12 990 Ft|49,99 lei
49.99 лв|49,99 лв.|199 руб.|199 руб|1 999 ₽|199 р.|₴250|250 грн|250 грн.|₪99.90
99.90 ₪|99 ש"ח|฿1,200|1,200 บาท|₫120.000|120.000₫|120.000 đ|120,000 VNĐ|VND 120000
₱499.00|Php 499|PHP 499|₦5,000|NGN 5,000|Rp 120.000|Rp120.000|IDR 120000|RM 12.90
RM12.90|S/ 49.90|S/49.90|S/. 49.90|Bs. 12|R 199,99|R199.99|ZAR 199|K 50|Q100.00
L 250.00|₡12,500|₲50.000|₵50|GH₵50|KSh 1,200|TSh 12,000|₸5 000|5 000 тг|₼12|12 AZN
12 ман|₾12|12 GEL|֏5000|৳500|Tk 500|500 ৳|៛4000|₭20,000|₮5000|Nu. 500|؋500|500 ر.س
د.إ 49|49 د.إ|AED 49|AED49.00|49 AED|Dhs 49|QR 100|KD 1.250|BD 1.250|12,50 €|€12,50
€ 12,50|12,50€|12.50 EUR|EUR 12.50|12,50 Euro|12 euros|£9.99|9.99 GBP|£9.99 GBP
$12.50 USD|USD $12.50|12.50 USD|$12.50|$ 12.50|$10.00 - $1,050.00|$10-$20|10 - 20 €
10–20 €|10,00 € – 20,00 €|€10 to €20|von 10 bis 20 €|from $12.99|from 12.99|From: $12
ab 12,99 €|ab 12,99 EUR|à partir de 12 €|desde 12 €|da 12 €|vanaf € 12|från 99 kr
fra 99 kr|od 99 zł|от 199 руб.|as low as $5|starting at $5|ca. 12 €|~12 €|≈ 12 €
¥100起|12 € inkl. MwSt.|12.50 incl. VAT|£12 each|12 kr/stk|1000 XOF|5 000 FCFA
5000 CFA|DM 12,50|12,50 DEM|12 ct|99¢|99p|12.50|12,50|1,050|1.050,00|١٢٫٥٠ ر.س
۱۲۰۰ تومان|３００円|12,000원|$0.99|0,99 €
$.99|.99|€,99|12€50|3£50|Kč 100|zł12.99|ƒ 12|NAf. 12|KM 12|Lek 100|ден 100|रु 100|रू. 100
12 DA|DT 12|FCFA 1000|1000 F CFA|EURO 12|12.50 US dollars|12 Canadian dollars|100 Swedish kronor
12.50 €/kg|12 €/Stück|12 € / 100 g|$0.50 / oz|$12.50 per month|12 € pro Monat|12,50 zł/szt.|100 ₽/шт.|100元/件
税込1,200円|Sale price: $9|$12.50 & up
"""
KEPT = [price for line in PRICES.strip().split("\n") for price in line.split("|")]


@pytest.mark.parametrize("price", KEPT)
def test_a_price_is_kept_as_given(price: str) -> None:
    assert read_price(price) == (price, "")
    for space in ("\u00a0", "\u202f", "\u2009"):
        assert clean_price(price.replace(" ", space)) == price, "spaces that do not break are told apart from no price"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("Too low to display", "not_understood"),
        ("bag 12", "not_understood"),
        ("12 bags", "not_understood"),
        ("3/4 inch", "not_understood"),
        ("5 for $10", "not_understood"),
        ("$.00", "not_positive"),
        ("12 kg", "not_understood"),
        ("X1000", "not_understood"),
        ("call us: 555-1234-99", "not_understood"),
        ("12/05/2023", "not_understood"),
        ("50%", "not_understood"),
        ("$", "blank"),
        ("\u2014", "blank"),
        ("n/a", "blank"),
        ("null", "blank"),
        ("$" + "1" * 80, "not_understood"),
        ("free", "not_understood"),
        (".a-box-inner{background-color:#fff}#alohaBuyBoxWidget .selected{color:#111}", "markup"),
        ('\n\t\t   \n  <div class="a-section a-spacing-none"', "markup"),
        ("var aPageStart = (new Date()).getTime();", "markup"),
        ("$0.00", "not_positive"),
        ("0", "not_positive"),
        ("0,00 €", "not_positive"),
        ("-$5.00", "not_positive"),
        ("$-5.00", "not_positive"),
        ("-12,50 kr", "not_positive"),
        ("−5 €", "not_positive"),
        (0, "not_positive"),
        (-1.5, "not_positive"),
        (0.004, "not_positive"),
        (float("nan"), "kind"),
        (float("inf"), "kind"),
        (True, "kind"),
        ({}, "kind"),
        ({"a": 1}, "kind"),
        ([True], "kind"),
        (["$1", "$2"], "surplus"),
        (10**400, "not_understood"),
        (1e10, "not_understood"),
        (None, ""),
        ("", ""),
        (" \n", ""),
        ([], ""),
        ([None, ""], ""),
    ],
)
def test_what_is_no_price_is_dropped_for_a_reason(value: object, reason: str) -> None:
    assert read_price(value) == ("", reason)
    assert reason in {"", *PRICE_REASONS}


@pytest.mark.parametrize(
    ("value", "price"),
    [
        (17.95, "17.95"),
        (69, "69.00"),
        ([69], "69.00"),
        (["12,50 kr"], "12,50 kr"),
        ({"amount": 9.5, "currency": "EUR"}, "9.50 EUR"),
        ({"price": "9,50", "priceCurrency": "SEK"}, "9,50 SEK"),
        ({"value": 9.5}, "9.50"),
        ({"value": "$9.50", "currency": None}, "$9.50"),
        (" \u200f99.90 ₪ ", "\u200f99.90 ₪"),
    ],
)
def test_other_forms_of_prices(value: object, price: str) -> None:
    assert clean_price(value) == price


def test_every_currency_sign_and_code_is_known() -> None:
    signs = [chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) == "Sc"]
    assert len(signs) > 60
    for sign in signs:
        if ord(sign) < 0x10000:  # beyond it are signs of historical scripts only
            assert is_price(f"{sign}12.50"), sign
            assert is_price(f"12.50 {sign}"), sign
    assert all(character in signs for character in SIGNS if character not in "-\u20cf" and not 0x20C1 <= ord(character) <= 0x20CF)
    assert len(set(CODES)) == len(CODES)
    for code in CODES:
        assert all(map(is_price, (f"{code} 12.50", f"12.50 {code}", f"{code}12", f"{code.lower()} 12"))), code


@settings(max_examples=200, deadline=None)
@given(st.text("0123456789.,'-–$€£¥ krzłKčRs/:~abfromtoEURSEK\u00a0", max_size=70))
def test_any_text_is_a_price_or_has_a_reason(text: str) -> None:
    price, reason = read_price(text)
    assert bool(price) + bool(reason) == (text.strip() != "")
    assert not price or any(character.isdecimal() and int(character) for character in price)


@pytest.mark.parametrize("text", ["1 " * 32, "1,1" * 21, "kr" * 32, "$" * 64, "1 11" * 16, "from " * 12 + "12", "A$" * 32])
def test_hostile_prices_take_no_long_time(text: str) -> None:
    for _ in range(200):
        is_price(text)
