//! The plain part of YAML, made into JSON: block mappings and sequences of simple scalars, which is what kubectl
//! and Helm write. Pure.
//!
//! Why: the YAML parser reads 10 MB/s, serde_json 240 MB/s (ten thousand EndpointSlices of ten endpoints: 2.8 s
//! and 0.12 s), and reading is most of the time from the begin of a list to the last map write. So this knows
//! few forms and is sure of them. Whatever else it sees, it gives up, and the YAML parser has the word; it also
//! has the word on every error. A property test holds the two against each other.

/// Deeper than any object is.
const MAX_DEPTH: usize = 32;
/// Keys of one mapping are compared each with each.
const MAX_KEYS: usize = 64;

/// The document as JSON, or `None` if it is not plain, or no YAML.
pub(super) fn to_json(text: &str) -> Option<String> {
    let mut plain = Plain { lines: Lines::new(text)?, json: String::with_capacity(text.len()) };
    plain.block(MAX_DEPTH)?;
    plain.lines.line.is_none().then_some(plain.json)
}

struct Plain<'a> {
    lines: Lines<'a>,
    json: String,
}

/// The lines with something on them.
struct Lines<'a> {
    /// The current one; `None` at the end.
    line: Option<Line<'a>>,
    rest: &'a str,
}

#[derive(Clone, Copy)]
struct Line<'a> {
    /// How many spaces it begins with.
    indent: usize,
    /// What comes after them, not empty, without trailing spaces.
    content: &'a str,
}

impl<'a> Lines<'a> {
    fn new(text: &'a str) -> Option<Self> {
        // In text like this, bytes are characters and lines end with a line feed only.
        if !text.bytes().all(|byte| byte == b'\n' || (b' '..=b'~').contains(&byte)) {
            return None;
        }
        let text = text.strip_prefix("---\n").unwrap_or(text);
        let mut lines = Lines { line: None, rest: text };
        lines.advance();
        Some(lines)
    }

    /// Goes to the next line that has something on it.
    fn advance(&mut self) {
        self.line = None;
        while let Some((line, rest)) = split_line(self.rest) {
            self.rest = rest;
            let content = line.trim_start_matches(' ');
            if !content.is_empty() && !content.starts_with('#') {
                let indent = line.len() - content.len();
                self.line = Some(Line { indent, content: content.trim_end_matches(' ') });
                return;
            }
        }
    }

    /// Reads the lines of a literal block (`|`) below a key at `indent`; they come after the current line, which
    /// is the key's. Blank lines, which have rules of their own, are not plain.
    fn literal(&mut self, indent: usize, mut each: impl FnMut(&str)) -> Option<()> {
        let mut block_indent = None;
        while let Some((line, rest)) = split_line(self.rest) {
            let content = line.trim_start_matches(' ');
            if content.is_empty() {
                return None;
            }
            let line_indent = line.len() - content.len();
            if line_indent <= indent {
                break;
            }
            let block_indent = *block_indent.get_or_insert(line_indent);
            each(line.get(block_indent..).filter(|_| line_indent >= block_indent)?);
            // Without a line feed the text of the block would end without one too.
            if self.rest.len() == line.len() {
                return None;
            }
            self.rest = rest;
        }
        self.advance();
        block_indent.map(drop)
    }
}

impl Plain<'_> {
    /// The block that begins with the current line.
    fn block(&mut self, depth: usize) -> Option<()> {
        let line = self.lines.line?;
        if is_item(line.content) {
            self.sequence(line.indent, depth.checked_sub(1)?)
        } else {
            self.mapping(line.indent, depth.checked_sub(1)?)
        }
    }

    fn mapping(&mut self, indent: usize, depth: usize) -> Option<()> {
        let mut keys: Vec<&str> = Vec::new();
        self.json.push('{');
        while let Some(line) = self.lines.line.filter(|line| line.indent >= indent) {
            if line.indent > indent || is_item(line.content) {
                return None;
            }
            let (key, value) = split_key(line.content)?;
            if keys.contains(&key) || keys.len() == MAX_KEYS {
                return None;
            }
            if !keys.is_empty() {
                self.json.push(',');
            }
            keys.push(key);
            self.string(key);
            self.json.push(':');
            self.value(value, indent, depth)?;
        }
        self.json.push('}');
        Some(())
    }

    /// The value of the key on the current line, which is at `indent`.
    fn value(&mut self, value: &str, indent: usize, depth: usize) -> Option<()> {
        if value == "|" {
            let json = &mut self.json;
            json.push('"');
            self.lines.literal(indent, |line| {
                escape(line, json);
                json.push_str("\\n");
            })?;
            self.json.push('"');
            return Some(());
        }
        self.lines.advance();
        if !value.is_empty() {
            return self.scalar(value, indent);
        }
        match self.lines.line {
            Some(line) if line.indent > indent => self.block(depth),
            // The items of a sequence may stand right below their key.
            Some(line) if line.indent == indent && is_item(line.content) => {
                self.sequence(indent, depth.checked_sub(1)?)
            }
            _ => {
                self.json.push_str("null");
                Some(())
            }
        }
    }

    fn sequence(&mut self, indent: usize, depth: usize) -> Option<()> {
        self.json.push('[');
        let mut first = true;
        while let Some(line) = self.lines.line.filter(|line| line.indent >= indent) {
            if line.indent > indent {
                return None;
            }
            let Some(item) = line.content.strip_prefix("- ") else {
                if line.content == "-" {
                    return None;
                }
                break;
            };
            if item.starts_with(' ') || is_item(item) {
                return None;
            }
            if !first {
                self.json.push(',');
            }
            first = false;
            if split_key(item).is_some() {
                // `- a: 1` begins a mapping whose keys stand below the `a`.
                self.lines.line = Some(Line { indent: indent + 2, content: item });
                self.mapping(indent + 2, depth.checked_sub(1)?)?;
            } else {
                self.lines.advance();
                self.scalar(item, indent)?;
            }
        }
        self.json.push(']');
        Some(())
    }

    /// A scalar whose line was left; it must have ended on it.
    fn scalar(&mut self, text: &str, indent: usize) -> Option<()> {
        if self.lines.line.is_some_and(|next| next.indent > indent) {
            return None;
        }
        if let Some(quoted) = ['"', '\''].into_iter().find(|&quote| text.starts_with(quote)) {
            let inner = text.strip_prefix(quoted)?.strip_suffix(quoted)?;
            if inner.contains(quoted) || (quoted == '"' && inner.contains('\\')) {
                return None;
            }
            self.string(inner);
            return Some(());
        }
        match text {
            "{}" | "[]" | "true" | "false" | "null" => self.json.push_str(text),
            _ if is_integer(text) => self.json.push_str(text),
            _ if is_surely_string(text) => self.string(text),
            _ => return None,
        }
        Some(())
    }

    fn string(&mut self, text: &str) {
        self.json.push('"');
        escape(text, &mut self.json);
        self.json.push('"');
    }
}

/// The first line, without its line feed, and the rest.
fn split_line(text: &str) -> Option<(&str, &str)> {
    if text.is_empty() {
        return None;
    }
    Some(text.split_once('\n').unwrap_or((text, "")))
}

/// Whether an item of a sequence begins here.
fn is_item(content: &str) -> bool {
    matches!(content.as_bytes(), [b'-'] | [b'-', b' ', ..])
}

/// Key and value, where this is `key: value` or `key:` with a plain key that cannot be anything but a string.
fn split_key(content: &str) -> Option<(&str, &str)> {
    let end = content.find(':')?;
    let (key, value) = (&content[..end], &content[end + 1..]);
    let is_key = key.starts_with(|c: char| c.is_ascii_alphabetic())
        && key.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'/' | b'-'))
        && !is_word_with_meaning(key);
    if !is_key || !(value.is_empty() || value.starts_with(' ')) {
        return None;
    }
    Some((key, value.trim_start_matches(' ')))
}

/// A decimal number that fits 64 bits and has no other reading.
fn is_integer(text: &str) -> bool {
    let digits = text.strip_prefix('-').unwrap_or(text);
    let leading = digits.as_bytes().first().copied();
    text == "0"
        || (leading.is_some_and(|byte| (b'1'..=b'9').contains(&byte))
            && all_digits(digits)
            && digits.len() <= 18)
}

/// Whether an unquoted scalar is a string for every YAML parser.
fn is_surely_string(text: &str) -> bool {
    let harmless = |byte: u8| {
        byte.is_ascii_alphanumeric()
            || matches!(byte, b'_' | b'.' | b'/' | b'-' | b':' | b'+' | b'=' | b'@' | b',')
    };
    // A space is harmless between words: not after a colon, not before a number sign, which is left out anyway.
    let spaced = |pair: &[u8]| pair[1] != b' ' || pair[0] != b':';
    let bytes = text.as_bytes();
    let plain = bytes.iter().all(|&byte| harmless(byte) || byte == b' ')
        && bytes.windows(2).all(spaced)
        && bytes.last() != Some(&b':');
    if !plain {
        return false;
    }
    match bytes.first() {
        Some(byte) if byte.is_ascii_alphabetic() => !is_word_with_meaning(text),
        Some(b'/') => true,
        Some(byte) if byte.is_ascii_digit() => {
            // An IPv4 address or CIDR, an IPv6 address with `::`, a UUID.
            let address = text.split('/').next().unwrap_or_default();
            (address.split('.').count() == 4 && address.split('.').all(all_digits))
                || text.contains("::")
                || text.bytes().filter(|&byte| byte == b'-').count() == 4
        }
        _ => false,
    }
}

/// Words that are booleans, null or numbers, in YAML 1.1 or 1.2, in any case.
fn is_word_with_meaning(text: &str) -> bool {
    const LONGEST: usize = "infinity".len();
    text.len() <= LONGEST
        && ["y", "n", "yes", "no", "on", "off", "true", "false", "null", "nan", "inf", "infinity"]
            .into_iter()
            .any(|word| text.eq_ignore_ascii_case(word))
}

fn all_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// Appends printable ASCII as the inside of a JSON string.
fn escape(text: &str, json: &mut String) {
    if !text.bytes().any(|byte| matches!(byte, b'"' | b'\\')) {
        return json.push_str(text);
    }
    for part in text.split_inclusive(['"', '\\']) {
        match part.as_bytes().last() {
            Some(&last @ (b'"' | b'\\')) => {
                json.push_str(&part[..part.len() - 1]);
                json.push('\\');
                json.push(char::from(last));
            }
            _ => json.push_str(part),
        }
    }
}

#[cfg(test)]
mod tests;
