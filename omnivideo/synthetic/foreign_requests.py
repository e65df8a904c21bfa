"""Requests of this world in other languages, from small dictionaries.

In the forms, {s} is a shape with its article and {c} a colour. Three languages are held out as a whole.
"""

# ruff: noqa: RUF001  (letters of other alphabets)

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Language:
    """The words of a language: shapes with an article, colours, and the forms of requests."""

    shapes: tuple[str, ...]
    colours: tuple[str, ...]
    forms: tuple[str, ...]


HELD_OUT_LANGUAGES = ("portuguese", "finnish", "korean")
LANGUAGES = {
    "german": Language(
        ("einen kreis", "ein quadrat", "ein dreieck", "einen stern"),
        ("rot", "grün", "blau", "gelb", "orange", "lila", "weiß"),
        ("zeichne {s} in {c}", "{s} in {c} bitte", "ich möchte {s} in {c}", "mach es {c}", "füge {s} in {c} hinzu",
         "ein video mit {s} in {c}", "{s}, das sich nach links bewegt", "der hintergrund soll schwarz sein",
         "kannst du {s} in {c} malen?", "mach den kreis größer", "entferne das dreieck", "zeig mir zwei sterne in {c}",
         "verwandle es in {s}", "was siehst du auf dem bild?"),
    ),
    "french": Language(
        ("un cercle", "un carré", "un triangle", "une étoile"),
        ("rouge", "vert", "bleu", "jaune", "orange", "violet", "blanc"),
        ("dessine {s} de couleur {c}", "{s} {c}", "je voudrais {s} {c}", "ajoute {s} {c}", "une vidéo avec {s} {c}",
         "fais-le {c}", "change la couleur en {c}", "{s} qui se déplace vers la gauche", "mets un fond noir",
         "peux-tu dessiner {s}?", "supprime le triangle", "montre-moi deux étoiles", "transforme-le en {s}",
         "que vois-tu sur cette image?"),
    ),
    "spanish": Language(
        ("un círculo", "un cuadrado", "un triángulo", "una estrella"),
        ("rojo", "verde", "azul", "amarillo", "naranja", "morado", "blanco"),
        ("dibuja {s} de color {c}", "{s} de color {c}", "quiero {s} de color {c}", "añade {s}", "hazlo {c}",
         "un vídeo de {s} que se mueve a la derecha", "cambia el color a {c}", "pon el fondo negro", "quita el círculo",
         "¿puedes dibujar {s}?", "muéstrame dos estrellas", "conviértelo en {s}", "haz más grande el cuadrado"),
    ),
    "italian": Language(
        ("un cerchio", "un quadrato", "un triangolo", "una stella"),
        ("rosso", "verde", "blu", "giallo", "arancione", "viola", "bianco"),
        ("disegna {s} di colore {c}", "{s} di colore {c}", "vorrei {s} di colore {c}", "aggiungi {s}", "fallo {c}",
         "un video con {s} che si muove a sinistra", "cambia il colore in {c}", "metti uno sfondo nero",
         "togli il triangolo", "puoi disegnare {s}?", "mostrami due stelle", "trasformalo in {s}"),
    ),
    "portuguese": Language(
        ("um círculo", "um quadrado", "um triângulo", "uma estrela"),
        ("vermelho", "verde", "azul", "amarelo", "laranja", "roxo", "branco"),
        ("desenhe {s} de cor {c}", "{s} na cor {c}", "eu quero {s} na cor {c}", "adicione {s}", "deixe-o {c}",
         "um vídeo de {s} que se move para a direita", "mude a cor para {c}", "coloque um fundo preto",
         "remova o triângulo", "você pode desenhar {s}?", "mostre duas estrelas", "transforme-o em {s}"),
    ),
    "dutch": Language(
        ("een cirkel", "een vierkant", "een driehoek", "een ster"),
        ("rood", "groen", "blauw", "geel", "oranje", "paars", "wit"),
        ("teken {s} in het {c}", "{s} in het {c}", "ik wil graag {s} in het {c}", "voeg {s} toe", "maak het {c}",
         "een video van {s} die naar links beweegt", "verander de kleur in {c}", "maak de achtergrond zwart",
         "verwijder de driehoek", "kun je {s} tekenen?", "laat me twee sterren zien", "verander het in {s}"),
    ),
    "polish": Language(
        ("koło", "kwadrat", "trójkąt", "gwiazdę"),
        ("czerwonym", "zielonym", "niebieskim", "żółtym", "pomarańczowym", "fioletowym", "białym"),
        ("narysuj {s} w kolorze {c}", "{s} w kolorze {c}", "chcę {s} w kolorze {c}", "dodaj {s}", "usuń trójkąt",
         "film, na którym {s} porusza się w lewo", "zmień tło na czarne", "czy możesz narysować {s}?",
         "pokaż mi {s}", "zamień to na {s}", "niech będzie w kolorze {c}"),
    ),
    "swedish": Language(
        ("en cirkel", "en kvadrat", "en triangel", "en stjärna"),
        ("rött", "grönt", "blått", "gult", "orange", "lila", "vitt"),
        ("rita {s} i {c}", "{s} i {c}", "jag vill ha {s} i {c}", "lägg till {s}", "gör den i {c}",
         "en video av {s} som rör sig åt vänster", "ändra färgen till {c}", "gör bakgrunden svart",
         "ta bort triangeln", "kan du rita {s}?", "visa mig två stjärnor", "förvandla den till {s}"),
    ),
    "danish": Language(
        ("en cirkel", "en firkant", "en trekant", "en stjerne"),
        ("rødt", "grønt", "blåt", "gult", "lilla", "hvidt"),
        ("tegn {s} i {c}", "{s} i {c}", "jeg vil gerne have {s} i {c}", "tilføj {s}", "gør den i {c}",
         "en video af {s} der bevæger sig til venstre", "gør baggrunden sort", "fjern trekanten",
         "kan du tegne {s}?", "vis mig to stjerner", "lav den om til {s}"),
    ),
    "turkish": Language(
        ("bir daire", "bir kare", "bir üçgen", "bir yıldız"),
        ("kırmızı", "yeşil", "mavi", "sarı", "turuncu", "mor", "beyaz"),
        ("{c} {s} çiz", "{c} {s} istiyorum", "lütfen {c} {s} göster", "{s} ekle", "onu {c} yap", "üçgeni sil",
         "sola giden {c} {s} videosu", "rengini {c} yap", "arka planı siyah yap", "{s} çizebilir misin?",
         "bana iki yıldız göster"),
    ),
    "finnish": Language(
        ("ympyrä", "neliö", "kolmio", "tähti"),
        ("punainen", "vihreä", "sininen", "keltainen", "oranssi", "violetti", "valkoinen"),
        ("piirrä {c} {s}", "{c} {s}", "haluan kuvan, jossa on {c} {s}", "lisää {c} {s}", "poista kolmio",
         "video, jossa {c} {s} liikkuu vasemmalle", "muuta tausta mustaksi", "voitko piirtää {s}?",
         "näytä minulle {c} {s}"),
    ),
    "russian": Language(
        ("круг", "квадрат", "треугольник", "звезду"),
        ("красного", "зелёного", "синего", "жёлтого", "оранжевого", "фиолетового", "белого"),
        ("нарисуй {s} {c} цвета", "{s} {c} цвета", "я хочу {s} {c} цвета", "добавь {s}", "удали треугольник",
         "видео, где {s} движется влево", "сделай фон чёрным", "можешь нарисовать {s}?", "покажи мне {s}",
         "преврати это в {s}"),
    ),
    "chinese": Language(
        ("圆形", "正方形", "三角形", "星星"),
        ("红色", "绿色", "蓝色", "黄色", "橙色", "紫色", "白色"),
        ("画一个{c}的{s}", "一个{c}的{s}", "我想要一个{c}的{s}", "请加一个{c}的{s}", "把它变成{c}", "把背景改成黑色",
         "一个向左移动的{c}{s}的视频", "删除{s}", "你能画一个{s}吗？", "给我看两个{c}的{s}", "把它变成{s}"),
    ),
    "japanese": Language(
        ("円", "四角", "三角形", "星"),
        ("赤い", "緑の", "青い", "黄色い", "オレンジの", "紫の", "白い"),
        ("{c}{s}を描いて", "{c}{s}", "{c}{s}が見たいです", "{c}{s}を追加して", "背景を黒にして", "それを{s}に変えて",
         "左に動く{c}{s}の動画", "{s}を消して", "{s}を描いてくれますか？", "{c}{s}を二つ見せて"),
    ),
    "korean": Language(
        ("원", "사각형", "삼각형", "별"),
        ("빨간색", "초록색", "파란색", "노란색", "주황색", "보라색", "흰색"),
        ("{c} {s}을 그려줘", "{c} {s}", "{c} {s}을 보고 싶어요", "{c} {s}을 추가해줘", "배경을 검은색으로 바꿔줘",
         "왼쪽으로 움직이는 {c} {s} 영상", "{s}을 지워줘", "{s}을 그릴 수 있어?", "{s}으로 바꿔줘"),
    ),
    "greek": Language(
        ("έναν κύκλο", "ένα τετράγωνο", "ένα τρίγωνο", "ένα αστέρι"),
        ("κόκκινο", "πράσινο", "μπλε", "κίτρινο", "πορτοκαλί", "μωβ", "άσπρο"),
        ("ζωγράφισε {s} σε {c}", "{s} σε {c}", "θέλω {s} σε {c}", "πρόσθεσε {s}", "κάνε το {c}",
         "κάνε το φόντο μαύρο", "μπορείς να ζωγραφίσεις {s};", "δείξε μου {s}"),
    ),
}  # fmt: skip


def sample_foreign_request(rng: random.Random, is_held_out: bool) -> str:
    """Return a request in a language other than English."""
    names = [name for name in LANGUAGES if (name in HELD_OUT_LANGUAGES) == is_held_out]
    language = LANGUAGES[rng.choice(names)]
    return rng.choice(language.forms).format(s=rng.choice(language.shapes), c=rng.choice(language.colours))
