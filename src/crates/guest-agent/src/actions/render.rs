//! Untrusted HTML, parsed here, where it can harm nobody but this guest.

use std::time::{Duration, Instant};

use ego_tree::iter::Edge;
use html5ever::tendril::{StrTendril, TendrilSink};
use microvm_protocol::message::Code;
use scraper::{ElementRef, Html, HtmlTreeSink, Node, Selector};
use serde::Deserialize;
use serde_json::{json, Value};
use url::Url;

use super::{fail, fetch, read, Outcome};

const MAX_HTML: usize = 4 << 20;
const PARSE_DEADLINE: Duration = Duration::from_secs(5);
/// How much is parsed between two looks at the clock.
const PIECE: usize = 8 << 10;
const DEFAULT_LINKS: usize = 1000;
/// Elements whose text nobody sees.
const INVISIBLE: [&str; 5] = ["script", "style", "noscript", "template", "head"];

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Params {
    html: Option<String>,
    url: Option<String>,
    max_links: Option<usize>,
}

pub fn render_page(params: Value, has_network: bool) -> Outcome {
    let params: Params = read(params)?;
    let base = match params.url.as_deref() {
        None => None,
        Some(text) => match Url::parse(text) {
            Ok(url) => Some(url),
            Err(error) => return fail(Code::BadParams, format!("url: {text:?} is not a URL: {error}")),
        },
    };
    let (html, base) = match (params.html, base) {
        (Some(html), base) => (html, base),
        (None, None) => (String::new(), None),
        (None, Some(url)) if url.as_str() == "about:blank" => (String::new(), Some(url)),
        (None, Some(url)) => {
            let url = fetch::parse_url(url.as_str())?;
            let page = fetch::fetch_page(&url, MAX_HTML as u64, has_network)?;
            if page.truncated {
                return fail(Code::TooLarge, format!("{url}: the page is over {MAX_HTML} bytes"));
            }
            // Where the redirects led to is what its links are relative to.
            let base = Url::parse(&page.url).unwrap_or(url);
            (String::from_utf8_lossy(&page.body).into_owned(), Some(base))
        }
    };
    if html.len() > MAX_HTML {
        return fail(Code::TooLarge, format!("html: {} bytes, at most {MAX_HTML} are rendered", html.len()));
    }
    let shown = base.as_ref().map_or("about:blank", Url::as_str).to_owned();
    let Some(page) = parse(&html, Instant::now() + PARSE_DEADLINE) else {
        return fail(Code::Timeout, format!("the page was not parsed within {} s", PARSE_DEADLINE.as_secs()));
    };
    Ok(render(&page, &html, &shown, base.as_ref(), params.max_links.unwrap_or(DEFAULT_LINKS)))
}

/// Parses in pieces, so that a page made to be slow (deep nesting costs the square of its depth) can be given up.
fn parse(html: &str, deadline: Instant) -> Option<Html> {
    let mut parser = html5ever::driver::parse_document(HtmlTreeSink::new(Html::new_document()), Default::default());
    let mut rest = html;
    while !rest.is_empty() {
        if Instant::now() >= deadline {
            return None;
        }
        let (piece, tail) = rest.split_at(rest.floor_char_boundary(PIECE));
        parser.process(StrTendril::from(piece));
        rest = tail;
    }
    Some(parser.finish())
}

fn render(page: &Html, html: &str, shown_url: &str, base: Option<&Url>, max_links: usize) -> Value {
    let select = |css: &str| Selector::parse(css).ok();
    let title = select("title").and_then(|title| page.select(&title).next()).map(|title| collapse(title.text()));
    let links: Vec<Value> = select("a[href]").map_or_else(Vec::new, |anchor| {
        let link = |a: ElementRef<'_>| {
            let href = a.attr("href").unwrap_or_default().trim();
            let href =
                base.and_then(|base| base.join(href).ok()).map_or_else(|| href.to_owned(), |url| url.to_string());
            json!({"href": href, "text": collapse(a.text())})
        };
        page.select(&anchor).take(max_links).map(link).collect()
    });
    json!({
        "url": shown_url,
        "title": title.unwrap_or_default(),
        "text": visible_text(page),
        "links": links,
        "sanitized_html": ammonia::clean(html),
    })
}

/// The text outside of invisible elements; walks the arena, so deep nesting costs no stack.
fn visible_text(page: &Html) -> String {
    let mut pieces: Vec<&str> = Vec::new();
    let mut hidden_in = None;
    for edge in page.root_element().traverse() {
        match edge {
            Edge::Open(node) => match node.value() {
                Node::Element(element) if hidden_in.is_none() && INVISIBLE.contains(&element.name()) => {
                    hidden_in = Some(node.id());
                }
                Node::Text(text) if hidden_in.is_none() => pieces.push(text),
                _ => {}
            },
            Edge::Close(node) => {
                if hidden_in == Some(node.id()) {
                    hidden_in = None;
                }
                // Elements part words on the page, except those that only style them.
                let parts = node.value().as_element().is_some_and(|element| !is_inline(element.name()));
                if parts && hidden_in.is_none() {
                    pieces.push(" ");
                }
            }
        }
    }
    collapse(pieces.into_iter())
}

fn is_inline(name: &str) -> bool {
    ["a", "abbr", "b", "code", "em", "font", "i", "mark", "s", "small", "span", "strong", "sub", "sup", "u"]
        .contains(&name)
}

fn collapse<'a>(pieces: impl Iterator<Item = &'a str>) -> String {
    let text: String = pieces.collect();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str = "<title> A \n page</title><style>p{}</style><p>one<b>two</b></p><p>three \
        <a href='/next'>go</a><script>evil()</script><img src=x onerror=evil()>";

    #[test]
    fn test_render_page_gives_title_text_links_and_nothing_evil() {
        let page = render_page(json!({"html": PAGE, "url": "https://example.com/a"}), false).unwrap();
        assert_eq!(page["title"], "A page");
        assert_eq!(page["text"], "onetwo three go");
        assert_eq!(page["links"], json!([{"href": "https://example.com/next", "text": "go"}]));
        assert!(!page["sanitized_html"].as_str().unwrap().contains("evil"), "{page}");
    }

    #[test]
    fn test_render_page_without_a_page_is_about_blank() {
        let expected = json!({"url": "about:blank", "title": "", "text": "", "links": [], "sanitized_html": ""});
        assert_eq!(render_page(json!({}), false).unwrap(), expected);
        assert_eq!(render_page(json!({"url": "about:blank"}), false).unwrap(), expected);
    }

    #[test]
    fn test_render_page_url_without_network_is_refused() {
        assert_eq!(render_page(json!({"url": "https://example.com"}), false).unwrap_err().code, Code::NetworkIsolated);
        assert_eq!(render_page(json!({"url": "no url"}), false).unwrap_err().code, Code::BadParams);
    }

    #[test]
    fn test_parse_past_its_deadline_is_given_up() {
        assert!(parse(&"<div>".repeat(100_000), Instant::now()).is_none());
    }

    #[test]
    fn test_render_page_deep_nesting_comes_back() {
        let html = "<div>".repeat(2_000) + "deep";
        assert_eq!(render_page(json!({"html": html}), false).unwrap()["text"], "deep");
    }
}
