"""Origins: where repositories, trees and bytes come from."""
