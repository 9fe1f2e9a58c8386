//! JSON as QEMU reads it: strings may stand in single quotes, a key comes only once. Knows no option by name.
//!
//! The grammar is RFC 8259 with QEMU's additions (`docs/interop/qmp-spec`): `'text'` beside `"text"`, and `\'` in
//! either. Integers that fit 64 bits stay integers; other numbers become `f64`.

use serde_json::{Map, Number, Value};

use crate::error::Error;

/// How deep arrays and objects may be nested (as in QEMU).
pub const MAX_DEPTH: usize = 1024;

/// Reads a text that holds exactly one value.
///
/// # Errors
/// The first mistake, in the words of `qemu-storage-daemon`, and where it is.
pub fn parse(text: &str) -> Result<Value, Error> {
    let mut reader = Reader { text, at: 0 };
    let value = reader.value()?;
    reader.skip_blanks();
    if reader.at < text.len() {
        return Err(Error::JsonTrailing);
    }
    Ok(value)
}

/// An array or object whose end has not been read.
enum Open {
    List(Vec<Value>),
    Object {
        members: Map<String, Value>,
        key: String,
    },
}

/// What comes next in the text.
enum Token {
    Value(Value),
    /// One of `{}[]:,`.
    Sign(u8),
}

struct Reader<'t> {
    text: &'t str,
    /// The next byte to read; always on a character's boundary.
    at: usize,
}

impl<'t> Reader<'t> {
    /// Reads one value. Keeps its own stack, so that depth costs no stack of the thread.
    fn value(&mut self) -> Result<Value, Error> {
        let mut stack: Vec<Open> = Vec::new();
        loop {
            let mut done = match self.token()? {
                Token::Value(value) => value,
                Token::Sign(open @ (b'{' | b'[')) => {
                    if stack.len() == MAX_DEPTH {
                        return Err(Error::JsonDepth);
                    }
                    let close = open + 2; // `{` to `}` and `[` to `]` in ASCII
                    if self.skip_sign(close) {
                        if open == b'{' {
                            Value::Object(Map::new())
                        } else {
                            Value::Array(Vec::new())
                        }
                    } else {
                        stack.push(if open == b'{' {
                            let members = Map::new();
                            let key = self.key(&members)?;
                            Open::Object { members, key }
                        } else {
                            Open::List(Vec::new())
                        });
                        continue;
                    }
                }
                Token::Sign(_) => return Err(self.error("expecting value")),
            };
            // Close all that ends here; go on with the next element of what does not.
            loop {
                match stack.pop() {
                    None => return Ok(done),
                    Some(Open::List(mut list)) => {
                        list.push(done);
                        if self.another(b']', "expected separator in list")? {
                            stack.push(Open::List(list));
                            break;
                        }
                        done = Value::Array(list);
                    }
                    Some(Open::Object { mut members, key }) => {
                        members.insert(key, done);
                        if self.another(b'}', "expected separator in dict")? {
                            let key = self.key(&members)?;
                            stack.push(Open::Object { members, key });
                            break;
                        }
                        done = Value::Object(members);
                    }
                }
            }
        }
    }

    /// Reads a key and its colon.
    fn key(&mut self, members: &Map<String, Value>) -> Result<String, Error> {
        let key = match self.token()? {
            Token::Value(Value::String(key)) => key,
            Token::Value(_) | Token::Sign(b'{' | b'[') => {
                return Err(self.error("key is not a string in object"));
            }
            Token::Sign(_) => return Err(self.error("expecting value")),
        };
        if members.contains_key(&key) {
            return Err(self.error("duplicate key"));
        }
        match self.token()? {
            Token::Sign(b':') => Ok(key),
            _ => Err(self.error("missing : in object pair")),
        }
    }

    /// Reads what stands behind an element: whether there is another one.
    fn another(&mut self, close: u8, problem: &str) -> Result<bool, Error> {
        match self.token()? {
            Token::Sign(b',') => Ok(true),
            Token::Sign(sign) if sign == close => Ok(false),
            _ => Err(self.error(problem)),
        }
    }

    fn token(&mut self) -> Result<Token, Error> {
        self.skip_blanks();
        let first = *self
            .text
            .as_bytes()
            .get(self.at)
            .ok_or_else(|| self.error("premature EOI"))?;
        match first {
            b'{' | b'}' | b'[' | b']' | b':' | b',' => {
                self.at += 1;
                Ok(Token::Sign(first))
            }
            b'"' | b'\'' => self
                .string(char::from(first))
                .map(|text| Token::Value(Value::String(text))),
            b'-' | b'0'..=b'9' => self
                .number()
                .map(|number| Token::Value(Value::Number(number))),
            b'a'..=b'z' => self.keyword().map(Token::Value),
            _ => {
                let stray: String = self.text[self.at..].chars().take(1).collect();
                Err(self.error(&format!("stray '{}'", stray.escape_default())))
            }
        }
    }

    fn keyword(&mut self) -> Result<Value, Error> {
        let word = self.take_while(|b| b.is_ascii_lowercase());
        match word {
            "true" => Ok(Value::Bool(true)),
            "false" => Ok(Value::Bool(false)),
            "null" => Ok(Value::Null),
            _ => Err(self.error(&format!("invalid keyword '{word}'"))),
        }
    }

    fn number(&mut self) -> Result<Number, Error> {
        let text =
            self.take_while(|b| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'-' | b'.'));
        // What the standard library reads beyond JSON (`1.`, `01`, `inf`) is refused first.
        if !is_number(text) {
            return Err(self.error(&format!("stray '{text}'")));
        }
        let whole = text
            .parse::<i64>()
            .map(Number::from)
            .or_else(|_| text.parse::<u64>().map(Number::from));
        let number = whole
            .ok()
            .or_else(|| text.parse::<f64>().ok().and_then(Number::from_f64));
        number.ok_or_else(|| self.error(&format!("number too large '{text}'")))
    }

    fn string(&mut self, quote: char) -> Result<String, Error> {
        self.at += 1;
        let mut result = String::new();
        loop {
            let mut rest = self.text[self.at..].chars();
            let Some(letter) = rest.next() else {
                return Err(self.error("premature EOI"));
            };
            self.at += letter.len_utf8();
            match letter {
                _ if letter == quote => return Ok(result),
                '\\' => result.push(self.escape()?),
                '\0'..='\x1f' => return Err(self.error("control character in string")),
                _ => result.push(letter),
            }
        }
    }

    /// Reads what stands behind a backslash.
    fn escape(&mut self) -> Result<char, Error> {
        let letter = *self
            .text
            .as_bytes()
            .get(self.at)
            .ok_or_else(|| self.error("premature EOI"))?;
        let meaning = match letter {
            b'"' | b'\'' | b'\\' | b'/' => char::from(letter),
            b'b' => '\x08',
            b'f' => '\x0c',
            b'n' => '\n',
            b'r' => '\r',
            b't' => '\t',
            b'u' => return self.unicode_escape(),
            _ => return Err(self.error("invalid escape sequence in string")),
        };
        self.at += 1;
        Ok(meaning)
    }

    /// Reads `uXXXX`, and the second half `\uXXXX` of a surrogate pair (RFC 8259, section 7).
    fn unicode_escape(&mut self) -> Result<char, Error> {
        let start = self.at;
        let unit = self.unit();
        let code = match unit {
            Some(high @ 0xd800..=0xdbff) if self.text[self.at..].starts_with('\\') => {
                self.at += 1;
                let low = self.unit().filter(|low| (0xdc00..=0xdfff).contains(low));
                low.map(|low| 0x10000 + ((high - 0xd800) << 10) + (low - 0xdc00))
            }
            _ => unit,
        };
        // No name and no path can hold a zero, so it is refused here once.
        code.and_then(char::from_u32)
            .filter(|letter| *letter != '\0')
            .ok_or_else(|| {
                let shown: String = self.text[start..].chars().take(5).collect();
                self.error(&format!(
                    "\\{} is not a valid Unicode character",
                    shown.escape_default()
                ))
            })
    }

    /// Reads `uXXXX`.
    fn unit(&mut self) -> Option<u32> {
        let digits = self.text.get(self.at..)?.strip_prefix('u')?.get(..4)?;
        if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return None;
        }
        self.at += 5;
        u32::from_str_radix(digits, 16).ok()
    }

    fn skip_blanks(&mut self) {
        self.take_while(|b| matches!(b, b' ' | b'\t' | b'\r' | b'\n'));
    }

    /// Whether `sign` comes next; if so it is read.
    fn skip_sign(&mut self, sign: u8) -> bool {
        self.skip_blanks();
        let is_next = self.text.as_bytes().get(self.at) == Some(&sign);
        self.at += usize::from(is_next);
        is_next
    }

    /// Reads as many ASCII bytes as `accepts` takes.
    fn take_while(&mut self, accepts: fn(u8) -> bool) -> &'t str {
        let rest = &self.text[self.at..];
        let length = rest.bytes().position(|b| !accepts(b)).unwrap_or(rest.len());
        self.at += length;
        &rest[..length]
    }

    fn error(&self, problem: &str) -> Error {
        Error::JsonSyntax {
            problem: problem.to_owned(),
            offset: self.at,
        }
    }
}

/// Whether `text` is a number by RFC 8259, section 6.
fn is_number(text: &str) -> bool {
    let digits = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    let text = text.strip_prefix('-').unwrap_or(text);
    let (text, exponent) = match text.split_once(['e', 'E']) {
        Some((text, exponent)) => (text, Some(exponent)),
        None => (text, None),
    };
    let (whole, fraction) = match text.split_once('.') {
        Some((whole, fraction)) => (whole, Some(fraction)),
        None => (text, None),
    };
    digits(whole)
        && (whole == "0" || !whole.starts_with('0'))
        && fraction.is_none_or(digits)
        && exponent
            .is_none_or(|exponent| digits(exponent.strip_prefix(['+', '-']).unwrap_or(exponent)))
}

#[cfg(test)]
mod tests;
