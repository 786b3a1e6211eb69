//! The secret that workers and server share.

use std::fmt;
use std::sync::Arc;

use subtle::ConstantTimeEq;

/// A shared secret, sent as `Authorization: Bearer …`. It keeps strangers and misconfigured workers out; it is
/// sent in the clear, so it is no protection from whoever can read the network.
#[derive(Clone)]
pub struct Token(Arc<str>);

/// A token that cannot stand in an HTTP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a token has 1 to {TOKEN_BYTES_MAX} printable ASCII characters and no spaces")]
pub struct InvalidToken;

impl Token {
    /// Checks and keeps a token.
    pub fn new(secret: &str) -> Result<Token, InvalidToken> {
        let fits = (1..=TOKEN_BYTES_MAX).contains(&secret.len())
            && secret.bytes().all(|byte| byte.is_ascii_graphic());
        if fits { Ok(Token(secret.into())) } else { Err(InvalidToken) }
    }

    pub(crate) fn secret(&self) -> &str {
        &self.0
    }

    /// Whether an `Authorization` header carries this token. The time it takes tells the token's length at
    /// most, never how much of a guess was right.
    pub(crate) fn admits(&self, authorization: &[u8]) -> bool {
        let Some((scheme, secret)) = authorization.split_at_checked(SCHEME.len()) else {
            return false;
        };
        scheme.eq_ignore_ascii_case(SCHEME) && bool::from(secret.ct_eq(self.0.as_bytes()))
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

const SCHEME: &[u8] = b"Bearer ";
const TOKEN_BYTES_MAX: usize = 512;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_whole_token_is_admitted() {
        let token = Token::new("s3cret").unwrap();
        assert!(token.admits(b"Bearer s3cret"));
        assert!(token.admits(b"bearer s3cret"));
        for wrong in
            ["", "Bearer", "Bearer ", "Bearer s3cre", "Bearer s3cret ", "Bearer S3cret", "Basics s3cret"]
        {
            assert!(!token.admits(wrong.as_bytes()), "{wrong:?}");
        }
    }

    #[test]
    fn a_token_fits_a_header_and_stays_out_of_logs() {
        for wrong in ["", "two words", "line\r\nbreak", "schlüssel"] {
            assert!(Token::new(wrong).is_err(), "{wrong:?}");
        }
        assert!(Token::new(&"x".repeat(513)).is_err());
        assert!(!format!("{:?}", Token::new("s3cret").unwrap()).contains("s3cret"));
    }
}
