//! Markdown as roff, for man pages: headings, paragraphs, lists, code blocks; code in a sentence is bold, emphasis is
//! underlined. What a man page has no form for (tables, pictures, HTML) is an error, never left out; a comment is not text.
//!
//! Source: man(7), groff_man(7).

use clap_mangen::roff::{Inline, Roff, bold, italic, roman};
use pulldown_cmark::{CodeBlockKind, Event, HeadingLevel, Parser, Tag, TagEnd};

/// What cannot be shown in a man page.
#[derive(Debug)]
pub struct NoFormFor(String);

impl std::fmt::Display for NoFormFor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "a man page has no form for {}", self.0)
    }
}

impl std::error::Error for NoFormFor {}

/// The page so far, and what the sentence being read is made of.
#[derive(Default)]
struct Page {
    roff: Roff,
    line: Vec<Inline>,
    /// How text is set: in a heading or a code block it is gathered here instead.
    gathered: Option<String>,
    is_bold: bool,
    is_italic: bool,
    /// A paragraph that begins an item of a list needs no macro of its own.
    begins_item: bool,
    /// The first paragraph of a section needs none either.
    begins_section: bool,
}

/// The sections of a page. A heading of the second level is a section, of the third a part of one.
pub fn to_roff(text: &str) -> Result<Roff, NoFormFor> {
    let mut page = Page::default();
    for event in Parser::new(text) {
        page.take(event)?;
    }
    Ok(page.roff)
}

impl Page {
    fn take(&mut self, event: Event<'_>) -> Result<(), NoFormFor> {
        match event {
            Event::Start(tag) => self.begin(&tag)?,
            Event::End(tag) => self.end(tag),
            Event::Text(text) => self.text(&text),
            Event::Code(code) => match &mut self.gathered {
                Some(gathered) => gathered.push_str(&code),
                None => self.line.push(bold(&*code)),
            },
            Event::SoftBreak => self.text(" "),
            Event::Html(html) if html.trim_start().starts_with("<!--") => {}
            other => return Err(NoFormFor(format!("{other:?}"))),
        }
        Ok(())
    }

    fn begin(&mut self, tag: &Tag<'_>) -> Result<(), NoFormFor> {
        match tag {
            Tag::Heading { .. } => self.gathered = Some(String::new()),
            Tag::CodeBlock(CodeBlockKind::Fenced(_)) => {
                self.gathered = Some(String::new());
            }
            Tag::Paragraph if self.begins_item => self.begins_item = false,
            Tag::Paragraph => self.begin_paragraph(),
            Tag::Item => {
                self.flush();
                self.control("IP", &["\u{2022}", "2"]);
                self.begins_item = true;
                self.begins_section = false;
            }
            Tag::Strong => self.is_bold = true,
            Tag::Emphasis => self.is_italic = true,
            Tag::List(None) | Tag::HtmlBlock => {}
            other => return Err(NoFormFor(format!("{other:?}"))),
        }
        Ok(())
    }

    fn end(&mut self, tag: TagEnd) {
        match tag {
            TagEnd::Heading(level) => {
                let macro_name = if level == HeadingLevel::H2 {
                    "SH"
                } else {
                    "SS"
                };
                let title = self.gathered.take().unwrap_or_default();
                self.control(macro_name, &[&title]);
                self.begins_section = true;
            }
            TagEnd::CodeBlock => {
                let code = self.gathered.take().unwrap_or_default();
                self.begin_paragraph();
                self.control("in", &["+4n"]);
                self.control("EX", &[]);
                for line in code.lines() {
                    self.roff.text([roman(line)]);
                }
                self.control("EE", &[]);
                self.control("in", &[]);
            }
            TagEnd::Strong => self.is_bold = false,
            TagEnd::Emphasis => self.is_italic = false,
            TagEnd::Paragraph | TagEnd::Item => self.flush(),
            _ => {}
        }
    }

    fn begin_paragraph(&mut self) {
        if !std::mem::take(&mut self.begins_section) {
            self.control("PP", &[]);
        }
    }

    fn text(&mut self, text: &str) {
        let set = match &mut self.gathered {
            Some(gathered) => return gathered.push_str(text),
            None if self.is_bold => bold,
            None if self.is_italic => italic,
            None => roman,
        };
        self.line.push(set(text));
    }

    fn flush(&mut self) {
        if !self.line.is_empty() {
            self.roff.text(std::mem::take(&mut self.line));
        }
    }

    fn control(&mut self, name: &str, arguments: &[&str]) {
        self.roff.control(name, arguments.iter().copied());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_paragraphs_lists_and_code_have_their_macros() {
        let text = "## FILES\n\n<!-- nobody sees this -->\nOf `-x` *and*\n.more.\n\n* one\n* two\n\n```console\n$ a \\\n.b\n```\n";
        let roff = to_roff(text).unwrap().to_roff();
        let expected = ".SH FILES\nOf \\fB\\-x\\fR \\fIand\\fR .more.\n.IP";
        assert!(roff.starts_with(expected), "{roff}");
        assert!(roff.contains(".EX\n$ a \\\\\n\\&.b\n.EE"), "{roff}");
    }

    #[test]
    fn what_has_no_form_is_an_error() {
        assert!(to_roff("![picture](a.png)").is_err());
        assert!(to_roff("1. first").is_err());
    }
}
