"""The OpenAPI document as one static page: no script, no font and no style from anywhere else."""

import html
import json
from typing import Any

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; } h3 code { font-size: 1rem; }
details { border: 1px solid #8884; border-radius: 6px; margin: .5rem 0; padding: .4rem .8rem; }
summary { cursor: pointer; } .method { font-weight: 700; display: inline-block; min-width: 4.5rem; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; vertical-align: top;
padding: .25rem .75rem .25rem 0; border-bottom: 1px solid #8883; }
pre { overflow-x: auto; background: #8881; padding: .75rem; border-radius: 6px; }
"""


def render(document: dict[str, Any]) -> str:
    """The page for an OpenAPI 3.1 document."""
    info = document["info"]
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>{_text(info['title'])} API</title><style>{_STYLE}</style></head><body>",
        f"<h1>{_text(info['title'])} {_text(info['version'])}</h1>{_paragraphs(info['description'])}",
        "<p>For programs: <a href='openapi.json'>openapi.json</a></p>",
    ]
    for tag in document["tags"]:
        parts.append(f"<h2>{_text(tag['name'])}</h2><p>{_text(tag['description'])}</p>")
        for path, methods in document["paths"].items():
            parts.extend(
                _operation(document, method, path, operation)
                for method, operation in methods.items()
                if tag["name"] in operation["tags"]
            )
    parts.append("<h2>Schemas</h2>")
    for name, schema in document["components"]["schemas"].items():
        parts.append(
            f"<details id='{_text(name)}'><summary><code>{_text(name)}</code></summary>{_json(schema)}"
            "</details>"
        )
    parts.append("</body></html>")
    return "".join(parts)


def _operation(document: dict[str, Any], method: str, path: str, operation: dict[str, Any]) -> str:
    parts = [
        f"<details><summary><span class='method'>{_text(method.upper())}</span> <code>{_text(path)}</code> ",
        f"{_text(operation['summary'])}</summary>{_paragraphs(operation.get('description', ''))}",
        _parameters(operation.get("parameters", [])),
    ]
    body = operation.get("requestBody", {}).get("content", {})
    for media_type, content in body.items():
        parts.append(f"<h3>Body <code>{_text(media_type)}</code> {_schema_link(content['schema'])}</h3>")
        parts.extend(
            f"<p>{_text(example['summary'])}</p>{_json(example['value'])}"
            for example in content["examples"].values()
        )
    parts.append("<h3>Answers</h3>")
    for status, response in operation["responses"].items():
        parts.append(f"<p><b>{_text(status)}</b> {_text(response['description'])}")
        for media_type, content in response.get("content", {}).items():
            parts.append(f" <code>{_text(media_type)}</code> {_schema_link(content['schema'])}")
            if status.startswith("2"):
                parts.append(_examples(document, content))
        parts.append("</p>")
    return "".join([*parts, "</details>"])


def _parameters(parameters: list[dict[str, Any]]) -> str:
    if not parameters:
        return ""
    rows = [
        f"<tr><td><code>{_text(parameter['name'])}</code></td><td>{_text(parameter['in'])}</td>"
        f"<td>{_text(parameter.get('description', ''))}</td></tr>"
        for parameter in parameters
    ]
    return f"<table><tr><th>Parameter</th><th>In</th><th></th></tr>{''.join(rows)}</table>"


def _examples(document: dict[str, Any], content: dict[str, Any]) -> str:
    if isinstance(content.get("example"), str):
        return f"<pre>{_text(content['example'])}</pre>"
    name = content["schema"].get("$ref", "").rsplit("/", maxsplit=1)[-1]
    examples = document["components"]["schemas"].get(name, {}).get("examples", [])
    return "".join(map(_json, examples))


def _schema_link(schema: dict[str, Any]) -> str:
    name = _text(schema.get("$ref", "").rsplit("/", maxsplit=1)[-1])
    return f"<a href='#{name}'>{name}</a>" if name else ""


def _paragraphs(text: str) -> str:
    return "".join(f"<p>{_text(paragraph)}</p>" for paragraph in text.split("\n\n") if paragraph)


def _json(value: Any) -> str:
    return f"<pre>{_text(json.dumps(value, indent=2))}</pre>"


def _text(value: str) -> str:
    return html.escape(value, quote=True)
