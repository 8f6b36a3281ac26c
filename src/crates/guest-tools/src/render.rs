//! Untrusted HTML: parsed, read and cleaned.

use std::time::{Duration, Instant};

use ego_tree::iter::Edge;
use html5ever::tendril::{StrTendril, TendrilSink};
use microvm_protocol::message::{Code, Failure};
use scraper::{Html, HtmlTreeSink, Node, Selector};
use serde::Deserialize;
use serde_json::{json, Value};
use url::Url;

use crate::{fail, fetch, read_params, Outcome};

const MAX_HTML: usize = 4 << 20;
const PARSE_DEADLINE: Duration = Duration::from_secs(5);
/// How much is parsed between two looks at the clock.
const PIECE: usize = 8 << 10;
const DEFAULT_LINKS: usize = 1000;
/// How much of a link's text is told, in characters: links in links would each tell the whole rest of the page.
const LINK_TEXT: usize = 1000;
/// Each relative link is told with all of it.
const MAX_URL: usize = 64 << 10;
/// Elements whose text nobody sees.
const INVISIBLE: [&str; 5] = ["script", "style", "noscript", "template", "head"];

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Params {
    html: Option<String>,
    url: Option<String>,
    max_links: Option<usize>,
}

pub fn render_page(params: Value, has_network: bool, max_response: usize) -> Outcome {
    let params: Params = read_params(params)?;
    if let Some(url) = params.url.as_ref().filter(|url| url.len() > MAX_URL) {
        return fail(Code::BadParams, format!("url: {} bytes, at most {MAX_URL}", url.len()));
    }
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
    let links = links(&page, base.as_ref(), params.max_links.unwrap_or(DEFAULT_LINKS), max_response)?;
    let mut rendered = json!({"url": shown, "title": title(&page), "links": links});
    rendered["text"] = Value::String(visible_text(&page));
    // The page is parsed once more; two trees would need twice the memory.
    drop(page);
    rendered["sanitized_html"] = Value::String(sanitize(&html));
    Ok(rendered)
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

fn title(page: &Html) -> String {
    let title = Selector::parse("title").ok().and_then(|title| page.select(&title).next());
    title.map(|title| collapse(title.text(), usize::MAX)).unwrap_or_default()
}

/// Counted while they are gathered: together they fit an answer, or there is none.
fn links(page: &Html, base: Option<&Url>, max_links: usize, max_response: usize) -> Result<Vec<Value>, Failure> {
    let Ok(anchor) = Selector::parse("a[href]") else { return Ok(Vec::new()) };
    let (mut links, mut bytes) = (Vec::new(), 0);
    for a in page.select(&anchor).take(max_links) {
        let href = a.attr("href").unwrap_or_default().trim();
        let href = base.and_then(|base| base.join(href).ok()).map_or_else(|| href.to_owned(), |url| url.to_string());
        let text = collapse(a.text(), LINK_TEXT);
        bytes += href.len() + text.len();
        if bytes > max_response {
            let first = links.len();
            let message =
                format!("the page's links have over {max_response} bytes; max_links below {first} leaves some out");
            return fail(Code::TooLarge, message);
        }
        links.push(json!({"href": href, "text": text}));
    }
    Ok(links)
}

/// A title is no part of the page that is shown.
fn sanitize(html: &str) -> String {
    ammonia::Builder::default().add_clean_content_tags(["title"]).clean(html).to_string()
}

/// The text outside of invisible elements; walks the arena, so deep nesting costs no stack.
fn visible_text(page: &Html) -> String {
    let mut text = Collapsed::new(usize::MAX);
    let mut hidden_in = None;
    for edge in page.root_element().traverse() {
        match edge {
            Edge::Open(node) => match node.value() {
                Node::Element(element) if hidden_in.is_none() && INVISIBLE.contains(&element.name()) => {
                    hidden_in = Some(node.id());
                }
                Node::Text(piece) if hidden_in.is_none() => text.push(piece),
                _ => {}
            },
            Edge::Close(node) => {
                if hidden_in == Some(node.id()) {
                    hidden_in = None;
                }
                // Elements part words on the page, except those that only style them.
                let parts = node.value().as_element().is_some_and(|element| !is_inline(element.name()));
                if parts && hidden_in.is_none() {
                    text.push(" ");
                }
            }
        }
    }
    text.text
}

fn is_inline(name: &str) -> bool {
    ["a", "abbr", "b", "code", "em", "font", "i", "mark", "s", "small", "span", "strong", "sub", "sup", "u"]
        .contains(&name)
}

fn collapse<'a>(pieces: impl Iterator<Item = &'a str>, max: usize) -> String {
    let mut collapsed = Collapsed::new(max);
    for piece in pieces {
        collapsed.push(piece);
        if collapsed.room == 0 {
            break;
        }
    }
    collapsed.text
}

/// Text with its white space made one space each, up to a number of characters.
struct Collapsed {
    text: String,
    room: usize,
    gap: bool,
}

impl Collapsed {
    fn new(max: usize) -> Self {
        Self { text: String::new(), room: max, gap: false }
    }

    fn push(&mut self, piece: &str) {
        for character in piece.chars() {
            if character.is_whitespace() {
                self.gap = !self.text.is_empty();
                continue;
            }
            let gap = usize::from(std::mem::take(&mut self.gap));
            if self.room <= gap {
                self.room = 0;
                return;
            }
            if gap > 0 {
                self.text.push(' ');
                self.room -= 1;
            }
            self.text.push(character);
            self.room -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str = "<title> A \n page</title><style>p{}</style><p>one<b>two</b></p><p>three \
        <a href='/next'>go</a><script>evil()</script><img src=x onerror=evil()>";

    #[test]
    fn test_render_page_gives_title_text_links_and_nothing_evil() {
        let page = render(json!({"html": PAGE, "url": "https://example.com/a"})).unwrap();
        assert_eq!(page["title"], "A page");
        assert_eq!(page["text"], "onetwo three go");
        assert_eq!(page["links"], json!([{"href": "https://example.com/next", "text": "go"}]));
        assert!(!page["sanitized_html"].as_str().unwrap().contains("evil"), "{page}");
    }

    fn render(params: Value) -> Outcome {
        render_page(params, false, 16 << 20)
    }

    #[test]
    fn test_render_page_leaves_the_title_out_of_the_clean_page() {
        let page = render(json!({"html": "<title>secret</title><p>one</p>"})).unwrap();
        assert_eq!((&page["title"], &page["sanitized_html"]), (&json!("secret"), &json!("<p>one</p>")));
    }

    #[test]
    fn test_render_page_links_in_links_tell_a_part_of_their_text() {
        let html = "<a href=x><object>".repeat(1000) + &"word ".repeat(20_000);
        let page = render(json!({"html": html})).unwrap();
        let links = page["links"].as_array().unwrap();
        assert_eq!(links.len(), 1000);
        assert!(links.iter().all(|link| link["text"].as_str().unwrap().len() <= LINK_TEXT), "{}", links[0]);
        let error = render_page(json!({"html": html}), false, 100_000).unwrap_err();
        assert_eq!(error.code, Code::TooLarge);
    }

    #[test]
    fn test_render_page_a_base_of_any_length_is_refused() {
        let url = format!("http://a/{}", "x".repeat(MAX_URL));
        assert_eq!(render(json!({"html": "", "url": url})).unwrap_err().code, Code::BadParams);
    }

    #[test]
    fn test_collapse_counts_characters() {
        assert_eq!(collapse([" \u{e9}", "a \n b", "cd"].into_iter(), 6), "\u{e9}a bc".to_owned() + "d");
        assert_eq!(collapse(["a ", " b"].into_iter(), 2), "a");
    }

    #[test]
    fn test_render_page_without_a_page_is_about_blank() {
        let expected = json!({"url": "about:blank", "title": "", "text": "", "links": [], "sanitized_html": ""});
        assert_eq!(render(json!({})).unwrap(), expected);
        assert_eq!(render(json!({"url": "about:blank"})).unwrap(), expected);
    }

    #[test]
    fn test_render_page_url_without_network_is_refused() {
        assert_eq!(render(json!({"url": "https://example.com"})).unwrap_err().code, Code::NetworkIsolated);
        assert_eq!(render(json!({"url": "no url"})).unwrap_err().code, Code::BadParams);
    }

    #[test]
    fn test_parse_past_its_deadline_is_given_up() {
        assert!(parse(&"<div>".repeat(100_000), Instant::now()).is_none());
    }

    #[test]
    fn test_render_page_deep_nesting_comes_back() {
        let html = "<div>".repeat(2_000) + "deep";
        assert_eq!(render(json!({"html": html})).unwrap()["text"], "deep");
    }
}
