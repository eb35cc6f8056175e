"""Recognize prices in the notations of many countries.

A price is an amount with a currency before it, after it, both or none; or a range of two amounts; with a few words
before and after.  The text is not converted, because it becomes part of a prompt.
"""

from __future__ import annotations

import re

MAX_PRICE_CHARS = 64

_ISO_4217 = (
    "AED AFN ALL AMD ANG AOA ARS AUD AWG AZN BAM BBD BDT BGN BHD BIF BMD BND BOB BOV BRL BSD BTN BWP BYN BZD CAD CDF CHE CHF "
    "CHW CLF CLP CNY COP COU CRC CUC CUP CVE CZK DJF DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS GIP GMD GNF GTQ GYD HKD "
    "HNL HRK HTG HUF IDR ILS INR IQD IRR ISK JMD JOD JPY KES KGS KHR KMF KPW KRW KWD KYD KZT LAK LBP LKR LRD LSL LYD MAD MDL "
    "MGA MKD MMK MNT MOP MRU MUR MVR MWK MXN MXV MYR MZN NAD NGN NIO NOK NPR NZD OMR PAB PEN PGK PHP PKR PLN PYG QAR RON RSD "
    "RUB RWF SAR SBD SCR SDG SEK SGD SHP SLE SLL SOS SRD SSP STN SVC SYP SZL THB TJS TMT TND TOP TRY TTD TWD TZS UAH UGX USD "
    "USN UYI UYU UYW UZS VED VES VND VUV WST XAF XCD XCG XOF XPF YER ZAR ZMW ZWG ZWL"
)
CODES = _ISO_4217.split()
"""ISO 4217 codes of circulating currencies (2024)."""

# Withdrawn codes, which old catalogues contain, and codes that shops use outside of the standard.
_FORMER_CODES = "ATS BEF BYR CYP DEM EEK ESP FIM FRF GRD IEP ITL LTL LUF LVL MTL NLG PTE ROL RUR SIT SKK TRL VEF BTC CNH NTD RMB"

# Unicode's category Sc.
SIGNS = "$¢£¤¥֏؋߾߿৲৳৻૱௹฿៛\u20a0-\u20cf꠸﷼﹩＄￠￡￥￦"

_WORDS_BEFORE = (
    "Rs Rp RM Fr SFr kr S/ B/ Bs Gs Br Tk Nu Kz KSh TSh USh Sh Dh Dhs SR QR KD BD JD LE TL YTL Lm Lt Ls Kn Ft Php VNĐ Afl Esc VT "
    "KM DA DT Lek Kč zł ƒ NAf Euro FCFA CFA kn ден дин so'm soʻm сум руб грн रु रू रु॰ रू॰ "
    "Ar MK ZK Le din DM د.إ ر.س ر.ق د.ك د.ب ر.ع ج.م د.م د.ت د.ج ل.ل د.ع"
)
_LETTERS_BEFORE = "RKQLPGT"  # rand, kwacha or kina, quetzal, lempira, pula, gourde or guarani, paanga; capitals only
_WORDS_AFTER = (
    "kr Kč Kčs Sk zł zl Ft lei leu leji ron lv лв лева лей kn Lt Ls "
    "руб рублей рубль рубля р грн гривень тг тенге ден дин динара din dinara сўм сум сом ман man manat so'm soʻm sum смн Бр Br "
    "KM TL YTL 元 圆 圓 円 块 塊 人民币 人民幣 港元 港币 港幣 台币 台幣 新台币 新台幣 日元 日圓 美元 欧元 歐元 원 "
    'đ VNĐ đồng dong บาท baht د.إ ر.س ر.ق د.ك د.ب ر.ع ج.م د.م د.ت د.ج ل.ل ل.س د.ع ريال ریال درهم جنيه دينار تومان ש״ח ש"ח '
    "Rs Rp RM Fr SFr Dh Dhs DA DT SR QR KD BD JD LE Tk FCFA CFA F birr "
    "euro euros dollar dollars pound pounds yen yuan rupee rupees won rand peso pesos real reais sol soles franc francs Franken "
    "forint koruna korun kronor kroner złoty złotych ruble rubles lira ringgit rupiah p c ct cent cents"
)

# Regular expressions, separated by two spaces.
_PHRASES_BEFORE = (
    r"from  only  just  now  approx\.?  ca\.?  circa  about  starting (?:at|from)  as low as  up to  under  price  msrp  rrp  "
    r"ab  nur  bis  von  à partir de  dès  a partire da  da  desde  a partir de  por  vanaf  voor  från  fra  fr\.o\.m\.  "
    r"endast  alkaen  od  już od  от  від  цена  约  約  从  從  từ  ~  ≈  "
    r"税込  税別  税抜  (?:sale|our|list|regular) price"
)
_PHRASES_AFTER = (
    r"each  ea\.?  pc  pcs  /\s?(?:1\d{0,3}\s?)?[^\W\d_]{1,10}\.?  "
    r"(?:per|pro|par|por|al|за)\s[^\W\d_]{1,10}\.?  (?:and|&) up  \+  \*  起  ～  ~  "
    r"(?:incl?|inkl|excl?|exkl)\.?\s?(?:vat|mwst|ust|gst|tax|moms|btw|iva)\.?  ttc  ht  \(?税込\)?  （税込）  m/n"
)


def _any_of(words: str) -> str:
    return "|".join(re.escape(word) for word in sorted(words.split(), key=len, reverse=True))


# Letters before a sign denote the country: US$, A$, HK$, R$, CN¥.
_SIGN = rf"(?:[A-Za-z]{{1,4}}\.?\s?)?[{SIGNS}](?:[A-Za-z]{{1,3}}\b)?"
_CODE = rf"(?:{'|'.join(CODES)}|{_any_of(_FORMER_CODES)})\.?"
_BEFORE = rf"(?:{_SIGN}|{_CODE}|(?:{_any_of(_WORDS_BEFORE)})\.?|(?-i:[{_LETTERS_BEFORE}])|[円元])"
_NATION = r"(?:u\.?s\.?|american|canadian|australian|new zealand|hong kong|singapore|british|swiss|danish|swedish|norwegian)\s"
_AFTER = rf"(?:{_SIGN}|{_CODE}|F\sCFA|(?:{_NATION})?(?:{_any_of(_WORDS_AFTER)})\.?)"

# Digits with points, commas, apostrophes and Arabic separators between them, or in groups after single spaces; then
# optionally a dash instead of decimals (``12,-``, ``12.–``, ``12:-``).
_DASH = r"\-‐-―−"
_NUMBER = rf"[.,]?\d(?:[\d.,'’ʼ٫٬，]|\s\d{{2,4}}(?!\d))*+(?:[{_DASH}]{{1,2}}(?!\s?\d)|:[{_DASH}]|/-)?"
_SIGN_AS_POINT = r"\d{1,6}[€$£]\d{2}(?!\d)"  # 12€50
_AMOUNT = rf"(?:{_SIGN_AS_POINT}|(?:{_BEFORE}\s?)?{_NUMBER}(?:\s?{_AFTER}(?!\w))?)"
_RANGE = rf"\s?(?:[{_DASH}~～〜]|\.\.\.?|…|(?:to|bis|à|a|til|till|tot|do|до|and)\s)\s?"
_PHRASE_BEFORE = rf"(?:(?:{'|'.join(_PHRASES_BEFORE.split('  '))}):?\s?)"
_PHRASE_AFTER = rf"(?:\s?(?:{'|'.join(_PHRASES_AFTER.split('  '))}))"
_PRICE = re.compile(rf"{_PHRASE_BEFORE}?{_AMOUNT}(?:{_RANGE}{_AMOUNT})?{_PHRASE_AFTER}?", re.IGNORECASE)
_NEGATIVE = re.compile(rf"(?:{_BEFORE}\s?)?[-−]\s?(?:{_BEFORE}\s?)?\d", re.IGNORECASE)
_POSITIVE = re.compile(r"[^0-9\-−]*[1-9][^\-−]*")  # has a non-zero digit and no minus
_MARKS = re.compile("[\u200b-\u200f\u061c\u2060]")  # invisible: direction of writing, joiners


def is_price(text: str) -> bool:
    """Whether a text on one line is a price or a range of prices; the amount may be zero."""
    text = _MARKS.sub("", text).strip()
    return len(text) <= MAX_PRICE_CHARS and _PRICE.fullmatch(text) is not None


def is_not_positive(text: str) -> bool:
    """Whether a text is an amount of zero or less: all its digits are zeros, or there is a minus before the first."""
    if _POSITIVE.fullmatch(text):  # the common case
        return False
    text = _MARKS.sub("", text).strip()
    if len(text) > MAX_PRICE_CHARS:
        return False
    if _NEGATIVE.match(text):
        return True
    digits = [character for character in text if character.isdecimal()]
    return bool(digits) and not any(map(int, digits)) and is_price(text)
