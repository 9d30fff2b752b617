"""The small world of the embedded curriculum: tables of true facts and the sentences that talk about them.

Pure data plus the few functions that read it (standard library only). Everything here was written for this
repository. `make_mini.py` turns it into training and evaluation files.

A *relation* links subjects to objects (country -> capital). Each relation has one *fact* per subject and, for
each language and direction, a *query*: question cores, statement sentences and one canonical answer sentence.
Cores come in kinds, because English word order depends on the frame around them:

    np    noun phrase                "the capital of {s}"            "What is {np}?", "Tell me {np}."
    w     wh-clause, fits anywhere   "which city is the capital"     "Which city ...?", "Tell me which ..."
    q     direct question only       "what does a {s} measure"       "What does ...?"
    e     embedded clause only       "what a {s} measures"           "Do you know what a ... measures?"
    fill  sentence without its end   "the capital of {s} is"         "Complete the sentence: ..."

Chinese needs no q/e split: word order stays the same. `{s}` is the subject, `{o}` the object, `{as}` the
subject with "a" or "an", `{p}` the part in counts. Statements end in what the query asks for where possible.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# --------------------------------------------------------------------------------------------------------
# Tables. One line per row, columns separated by "|", "-" means "no value".
# --------------------------------------------------------------------------------------------------------

# country | 中文 | capital | 首都 | continent | language | currency
COUNTRIES = """
France|法国|Paris|巴黎|Europe|French|-
Germany|德国|Berlin|柏林|Europe|-|-
Italy|意大利|Rome|罗马|Europe|Italian|-
Spain|西班牙|Madrid|马德里|Europe|Spanish|euro
Portugal|葡萄牙|Lisbon|里斯本|-|Portuguese|-
Greece|希腊|Athens|雅典|Europe|Greek|-
Poland|波兰|Warsaw|华沙|-|Polish|zloty
Hungary|匈牙利|Budapest|布达佩斯|-|Hungarian|forint
Sweden|瑞典|Stockholm|斯德哥尔摩|Europe|Swedish|krona
Norway|挪威|Oslo|奥斯陆|-|Norwegian|-
Denmark|丹麦|Copenhagen|哥本哈根|-|Danish|-
Finland|芬兰|Helsinki|赫尔辛基|-|-|-
Austria|奥地利|Vienna|维也纳|-|German|-
Switzerland|瑞士|Bern|伯尔尼|Europe|-|franc
Ireland|爱尔兰|Dublin|都柏林|-|-|-
Britain|英国|London|伦敦|-|English|pound
Russia|俄罗斯|Moscow|莫斯科|-|Russian|ruble
Ukraine|乌克兰|Kyiv|基辅|Europe|Ukrainian|-
Romania|罗马尼亚|Bucharest|布加勒斯特|-|Romanian|leu
Serbia|塞尔维亚|Belgrade|贝尔格莱德|-|-|dinar
Turkey|土耳其|Ankara|安卡拉|-|Turkish|lira
China|中国|Beijing|北京|Asia|Chinese|yuan
Japan|日本|Tokyo|东京|Asia|Japanese|yen
South Korea|韩国|Seoul|首尔|-|Korean|won
Mongolia|蒙古|Ulaanbaatar|乌兰巴托|Asia|-|-
Vietnam|越南|Hanoi|河内|-|Vietnamese|dong
Thailand|泰国|Bangkok|曼谷|Asia|Thai|baht
Malaysia|马来西亚|Kuala Lumpur|吉隆坡|-|Malay|ringgit
Cambodia|柬埔寨|Phnom Penh|金边|-|-|-
India|印度|New Delhi|新德里|Asia|-|rupee
Pakistan|巴基斯坦|Islamabad|伊斯兰堡|-|-|-
Nepal|尼泊尔|Kathmandu|加德满都|Asia|Nepali|-
Bangladesh|孟加拉国|Dhaka|达卡|-|-|taka
Iran|伊朗|Tehran|德黑兰|-|Persian|rial
Iraq|伊拉克|Baghdad|巴格达|Asia|-|-
Egypt|埃及|Cairo|开罗|Africa|Arabic|-
Morocco|摩洛哥|Rabat|拉巴特|Africa|-|dirham
Kenya|肯尼亚|Nairobi|内罗毕|Africa|-|shilling
Ethiopia|埃塞俄比亚|Addis Ababa|亚的斯亚贝巴|Africa|-|-
Ghana|加纳|Accra|阿克拉|Africa|-|cedi
Nigeria|尼日利亚|Abuja|阿布贾|Africa|-|naira
Cuba|古巴|Havana|哈瓦那|North America|-|-
Mexico|墨西哥|Mexico City|墨西哥城|North America|-|peso
Canada|加拿大|Ottawa|渥太华|North America|-|-
America|美国|Washington|华盛顿|-|-|dollar
Brazil|巴西|Brasilia|巴西利亚|South America|-|real
Argentina|阿根廷|Buenos Aires|布宜诺斯艾利斯|South America|-|-
Chile|智利|Santiago|圣地亚哥|South America|-|-
Peru|秘鲁|Lima|利马|South America|-|-
Colombia|哥伦比亚|Bogota|波哥大|South America|-|-
Australia|澳大利亚|Canberra|堪培拉|Oceania|-|-
New Zealand|新西兰|Wellington|惠灵顿|Oceania|-|-
"""

CONTINENTS_ZH = {
    "Europe": "欧洲",
    "Asia": "亚洲",
    "Africa": "非洲",
    "North America": "北美洲",
    "South America": "南美洲",
    "Oceania": "大洋洲",
}
LANGUAGES_ZH = {
    "French": "法语",
    "German": "德语",
    "Italian": "意大利语",
    "Spanish": "西班牙语",
    "Portuguese": "葡萄牙语",
    "Greek": "希腊语",
    "Polish": "波兰语",
    "Hungarian": "匈牙利语",
    "Swedish": "瑞典语",
    "Norwegian": "挪威语",
    "Danish": "丹麦语",
    "English": "英语",
    "Russian": "俄语",
    "Ukrainian": "乌克兰语",
    "Romanian": "罗马尼亚语",
    "Turkish": "土耳其语",
    "Chinese": "汉语",
    "Japanese": "日语",
    "Korean": "韩语",
    "Vietnamese": "越南语",
    "Thai": "泰语",
    "Malay": "马来语",
    "Nepali": "尼泊尔语",
    "Persian": "波斯语",
    "Arabic": "阿拉伯语",
}
CURRENCIES_ZH = {
    "euro": "欧元",
    "zloty": "兹罗提",
    "forint": "福林",
    "krona": "克朗",
    "franc": "法郎",
    "pound": "英镑",
    "ruble": "卢布",
    "leu": "列伊",
    "dinar": "第纳尔",
    "lira": "里拉",
    "yuan": "人民币",
    "yen": "日元",
    "won": "韩元",
    "dong": "越南盾",
    "baht": "泰铢",
    "ringgit": "林吉特",
    "rupee": "卢比",
    "taka": "塔卡",
    "rial": "里亚尔",
    "dirham": "迪拉姆",
    "shilling": "先令",
    "cedi": "塞地",
    "naira": "奈拉",
    "peso": "比索",
    "dollar": "美元",
    "real": "雷亚尔",
}

# element | 中文 | symbol | atomic number
ELEMENTS = """
hydrogen|氢|H|1
helium|氦|He|2
lithium|锂|Li|3
boron|硼|B|5
carbon|碳|C|6
nitrogen|氮|N|7
oxygen|氧|O|8
fluorine|氟|F|9
neon|氖|Ne|10
sodium|钠|Na|11
magnesium|镁|Mg|12
aluminium|铝|Al|13
silicon|硅|Si|14
phosphorus|磷|P|15
sulfur|硫|S|16
chlorine|氯|Cl|17
argon|氩|Ar|18
potassium|钾|K|19
calcium|钙|Ca|20
titanium|钛|Ti|22
chromium|铬|Cr|-
iron|铁|Fe|26
cobalt|钴|Co|-
nickel|镍|Ni|28
copper|铜|Cu|29
zinc|锌|Zn|30
silver|银|Ag|47
tin|锡|Sn|50
tungsten|钨|W|-
platinum|铂|Pt|-
gold|金|Au|79
mercury|汞|Hg|80
lead|铅|Pb|82
uranium|铀|U|92
"""

# animal | 中文 | class | young (English)
ANIMALS = """
dog|狗|-|puppy
cat|猫|-|kitten
cow|牛|-|calf
horse|马|-|foal
sheep|羊|-|lamb
lion|狮子|-|cub
goat|山羊|-|kid
pig|猪|-|piglet
kangaroo|袋鼠|mammal|joey
deer|鹿|-|fawn
whale|鲸|mammal|-
dolphin|海豚|mammal|-
bat|蝙蝠|mammal|-
duck|鸭子|-|duckling
goose|鹅|-|gosling
swan|天鹅|-|cygnet
hen|母鸡|-|chick
owl|猫头鹰|bird|owlet
eagle|老鹰|bird|eaglet
penguin|企鹅|bird|-
ostrich|鸵鸟|bird|-
frog|青蛙|amphibian|tadpole
toad|蟾蜍|amphibian|-
newt|蝾螈|amphibian|-
snake|蛇|reptile|-
lizard|蜥蜴|reptile|-
turtle|乌龟|reptile|hatchling
crocodile|鳄鱼|reptile|-
shark|鲨鱼|fish|-
salmon|三文鱼|fish|-
goldfish|金鱼|fish|-
ant|蚂蚁|insect|-
bee|蜜蜂|insect|-
butterfly|蝴蝶|insect|caterpillar
mosquito|蚊子|insect|-
"""
CLASSES_ZH = {
    "mammal": "哺乳动物",
    "bird": "鸟类",
    "amphibian": "两栖动物",
    "reptile": "爬行动物",
    "fish": "鱼类",
    "insect": "昆虫",
}

# planet | 中文 | position counted from the sun
PLANETS = """
Mercury|水星|1
Venus|金星|2
Earth|地球|3
Mars|火星|4
Jupiter|木星|5
Saturn|土星|6
Uranus|天王星|7
Neptune|海王星|8
"""
ORDINALS = ["zeroth", "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth",
            "tenth", "eleventh", "twelfth"]  # fmt: skip
DIGITS_ZH = ["零", "一", "二", "三", "四", "五", "六", "七", "八", "九", "十", "十一", "十二"]

# invention or discovery | 中文 | person | 人物 | verb (invented / discovered)
INVENTIONS = """
telephone|电话|Alexander Graham Bell|贝尔
steam locomotive|蒸汽机车|Richard Trevithick|特里维西克
dynamite|炸药|Alfred Nobel|诺贝尔
phonograph|留声机|Thomas Edison|爱迪生
electric battery|电池|Alessandro Volta|伏打
World Wide Web|万维网|Tim Berners-Lee|蒂姆·伯纳斯-李
diesel engine|柴油机|Rudolf Diesel|狄塞尔
lightning rod|避雷针|Benjamin Franklin|富兰克林
mercury thermometer|水银温度计|Daniel Fahrenheit|华伦海特
seismoscope|地动仪|Zhang Heng|张衡
movable type printing|活字印刷术|Bi Sheng|毕昇
barometer|气压计|Evangelista Torricelli|托里拆利
stethoscope|听诊器|Rene Laennec|雷奈克
safety elevator|安全电梯|Elisha Otis|奥的斯
pendulum clock|摆钟|Christiaan Huygens|惠更斯
cotton gin|轧棉机|Eli Whitney|惠特尼
hot air balloon|热气球|Montgolfier brothers|蒙哥尔费兄弟
reading system for the blind|盲文|Louis Braille|布莱叶
Linux kernel|Linux内核|Linus Torvalds|林纳斯
Python language|Python语言|Guido van Rossum|吉多
"""

# book | 中文 | author | 作者
BOOKS = """
Hamlet|《哈姆雷特》|William Shakespeare|莎士比亚
Don Quixote|《堂吉诃德》|Miguel de Cervantes|塞万提斯
War and Peace|《战争与和平》|Leo Tolstoy|托尔斯泰
Oliver Twist|《雾都孤儿》|Charles Dickens|狄更斯
Pride and Prejudice|《傲慢与偏见》|Jane Austen|简·奥斯汀
Moby-Dick|《白鲸》|Herman Melville|梅尔维尔
Robinson Crusoe|《鲁滨逊漂流记》|Daniel Defoe|笛福
Faust|《浮士德》|Johann Goethe|歌德
Les Miserables|《悲惨世界》|Victor Hugo|雨果
The Little Mermaid|《海的女儿》|Hans Christian Andersen|安徒生
Alice in Wonderland|《爱丽丝梦游仙境》|Lewis Carroll|卡罗尔
Treasure Island|《金银岛》|Robert Stevenson|史蒂文森
Jane Eyre|《简·爱》|Charlotte Bronte|夏洛蒂·勃朗特
Wuthering Heights|《呼啸山庄》|Emily Bronte|艾米莉·勃朗特
The Divine Comedy|《神曲》|Dante Alighieri|但丁
Journey to the West|《西游记》|Wu Cheng'en|吴承恩
Dream of the Red Chamber|《红楼梦》|Cao Xueqin|曹雪芹
Romance of the Three Kingdoms|《三国演义》|Luo Guanzhong|罗贯中
Water Margin|《水浒传》|Shi Nai'an|施耐庵
Crime and Punishment|《罪与罚》|Fyodor Dostoevsky|陀思妥耶夫斯基
"""

# landmark | 中文 | city | 城市
LANDMARKS = """
Eiffel Tower|埃菲尔铁塔|Paris|巴黎
Colosseum|斗兽场|Rome|罗马
Forbidden City|故宫|Beijing|北京
Big Ben clock tower|大本钟|London|伦敦
Red Square|红场|Moscow|莫斯科
Parthenon|帕特农神庙|Athens|雅典
Statue of Liberty|自由女神像|New York|纽约
Golden Gate Bridge|金门大桥|San Francisco|旧金山
Blue Mosque|蓝色清真寺|Istanbul|伊斯坦布尔
Terracotta Army|兵马俑|Xi'an|西安
Potala Palace|布达拉宫|Lhasa|拉萨
West Lake|西湖|Hangzhou|杭州
Oriental Pearl Tower|东方明珠塔|Shanghai|上海
Brandenburg Gate|勃兰登堡门|Berlin|柏林
Taj Mahal|泰姬陵|Agra|阿格拉
Tower of the Sun|太阳之塔|Osaka|大阪
Sagrada Familia|圣家堂|Barcelona|巴塞罗那
Burj Khalifa|哈利法塔|Dubai|迪拜
Charles Bridge|查理大桥|Prague|布拉格
Prado Museum|普拉多博物馆|Madrid|马德里
Little Mermaid statue|小美人鱼雕像|Copenhagen|哥本哈根
Canton Tower|小蛮腰电视塔|Guangzhou|广州
"""

# English word | 中文词
WORDS = """
apple|苹果
banana|香蕉
bread|面包
water|水
milk|牛奶
rice|米饭
egg|鸡蛋
tea|茶
book|书
pen|钢笔
table|桌子
chair|椅子
door|门
window|窗户
house|房子
school|学校
teacher|老师
student|学生
doctor|医生
friend|朋友
mother|妈妈
father|爸爸
river|河流
mountain|山
sea|大海
sun|太阳
moon|月亮
star|星星
rain|雨
snow|雪
wind|风
fire|火
tree|树
flower|花
grass|草
train|火车
bicycle|自行车
airplane|飞机
ship|船
music|音乐
picture|图画
letter|信
money|钱
clock|时钟
shoe|鞋子
hat|帽子
red|红色
green|绿色
blue|蓝色
happy|高兴
"""

# month | 中文 | number ; the Chinese name already contains the number, so only English asks for it
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
          "November", "December"]  # fmt: skip

# whole (singular) | 中文 | part (plural) | 中文 | how many
UNITS = """
minute|一分钟|seconds|秒|60
hour|一小时|minutes|分钟|60
day|一天|hours|小时|24
week|一星期|days|天|7
year|一年|months|个月|12
century|一个世纪|years|年|100
decade|一个年代|years|年|10
kilometer|一公里|meters|米|1000
meter|一米|centimeters|厘米|100
centimeter|一厘米|millimeters|毫米|10
kilogram|一千克|grams|克|1000
foot|一英尺|inches|英寸|12
dozen|一打|pieces|个|12
triangle|三角形|sides|条边|3
square|正方形|sides|条边|4
pentagon|五边形|sides|条边|5
hexagon|六边形|sides|条边|6
octagon|八边形|sides|条边|8
spider|蜘蛛|legs|条腿|8
chessboard|国际象棋棋盘|squares|个格子|64
"""

# instrument | what it measures (English only: the Chinese names contain the quantity)
INSTRUMENTS = """
thermometer|temperature
barometer|air pressure
speedometer|speed
compass|direction
stopwatch|time
voltmeter|voltage
ammeter|electric current
seismograph|earthquakes
hygrometer|humidity
protractor|angles
altimeter|altitude
ruler|length
odometer|distance
balance|mass
"""

# English opposites
OPPOSITES_EN = """
hot|cold
big|small
tall|short
fast|slow
light|dark
good|bad
rich|poor
early|late
full|empty
strong|weak
easy|difficult
happy|sad
hard|soft
young|old
wet|dry
open|closed
clean|dirty
thick|thin
deep|shallow
loud|quiet
brave|cowardly
sharp|blunt
wide|narrow
left|right
up|down
inside|outside
begin|end
push|pull
win|lose
buy|sell
"""

OPPOSITES_ZH = """
大|小
高|矮
多|少
长|短
快|慢
冷|热
黑|白
新|旧
远|近
轻|重
胖|瘦
早|晚
厚|薄
粗|细
硬|软
深|浅
真|假
美|丑
甜|苦
前|后
左|右
上|下
开|关
买|卖
哭|笑
强|弱
富|穷
宽|窄
勇敢|胆小
成功|失败
"""

# irregular past tenses (English)
PASTS = """
go|went
see|saw
eat|ate
take|took
give|gave
come|came
run|ran
write|wrote
speak|spoke
drink|drank
sing|sang
swim|swam
buy|bought
think|thought
teach|taught
catch|caught
fly|flew
know|knew
break|broke
sleep|slept
"""

# Chinese measure words; several nouns share one, as in real life
MEASURES_ZH = """
马|匹
鱼|条
书|本
纸|张
花|朵
树|棵
车|辆
飞机|架
衣服|件
鞋子|双
猫|只
牛|头
刀|把
信|封
船|艘
灯|盏
桥|座
诗|首
画|幅
米饭|碗
"""

# Chinese poems
POEMS_ZH = """
《静夜思》|李白
《春晓》|孟浩然
《登鹳雀楼》|王之涣
《春望》|杜甫
《相思》|王维
《江雪》|柳宗元
《悯农》|李绅
《游子吟》|孟郊
《咏鹅》|骆宾王
《咏柳》|贺知章
《清明》|杜牧
《枫桥夜泊》|张继
《赋得古原草送别》|白居易
《题西林壁》|苏轼
《元日》|王安石
《示儿》|陆游
"""


def rows(table: str) -> list[list[str]]:
    """Split one of the tables above into rows of columns."""
    return [line.split("|") for line in table.strip().splitlines()]


def article(noun: str) -> str:
    """ "dog" -> "a dog", "owl" -> "an owl" (good enough for the words of this world)."""
    return f"{'an' if noun[0].lower() in 'aeio' else 'a'} {noun}"


# --------------------------------------------------------------------------------------------------------
# Sentences
# --------------------------------------------------------------------------------------------------------


@dataclass
class Query:
    """How one direction of a relation is asked, answered and stated in one language."""

    language: str  # "en" or "zh"
    answer: str  # canonical answer sentence, contains {s} and {o} as seen from this direction
    cores: dict[str, list[str]]  # kind -> question cores
    statements: list[str]
    what: str = ""  # question word after a noun phrase: what / who, 什么 / 谁 / 哪里 / 多少
    followup: str = "{s}"  # how the subject is named in "And what about ...?"


@dataclass
class Relation:
    """One relation: facts and the queries per (language, direction)."""

    name: str
    facts: list[dict[str, tuple[str, str]]] = field(default_factory=list)  # language -> (subject, object)
    queries: dict[tuple[str, str], Query] = field(default_factory=dict)  # (language, "forward"|"reverse")
    numeric: bool = False  # objects of the forward direction are numbers
    symmetric: bool = False  # forward and reverse questions sound the same, so they hold out the same words
    case: bool = False  # compare objects case-sensitively (chemical symbols)

    @property
    def languages(self) -> list[str]:
        return sorted({language for language, _ in self.queries})

    def subject_key(self, fact: dict[str, tuple[str, str]]) -> str:
        return fact.get("en", fact.get("zh"))[0]


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines() if line.strip()]


def _query(
    language: str, answer: str, statements: str, what: str = "", followup: str = "{s}", **cores: str
) -> Query:
    what = what or ("what" if language == "en" else "什么")
    texts = {kind: _lines(lines) for kind, lines in cores.items()}
    return Query(language, answer, texts, _lines(statements), what, followup)


def build_relations() -> list[Relation]:
    """All relations of the world, facts and queries filled in."""
    relations: list[Relation] = []
    countries, elements, animals = rows(COUNTRIES), rows(ELEMENTS), rows(ANIMALS)

    def add(name, facts, **flags) -> Relation:
        relation = Relation(name, facts, **flags)
        relations.append(relation)
        return relation

    # ---- capital
    r = add("capital", [{"en": (c[0], c[2]), "zh": (c[1], c[3])} for c in countries])
    r.queries["en", "forward"] = _query(
        "en",
        "The capital of {s} is {o}.",
        """
        The capital of {s} is {o}.
        The capital city of {s} is {o}.
        {s}'s capital is {o}.
        {s}'s capital city is {o}.
        {s} has its capital in {o}.
        The government of {s} sits in {o}.
        As its capital city, {s} has {o}.
        In {s}, the capital is {o}.
        {s} is a country whose capital is {o}.
        {s}: capital {o}.
        The city that serves as the capital of {s} is {o}.
        Anyone who visits the capital of {s} arrives in {o}.
        People in {s} call {o} their capital.
        The main city of the government of {s} is {o}.
        {s} is governed from its capital, {o}.
        """,
        np="""
        the capital of {s}
        the capital city of {s}
        {s}'s capital
        {s}'s capital city
        the name of {s}'s capital
        the name of the capital of {s}
        the city that is the capital of {s}
        the capital of the country {s}
        """,
        w="""
        which city is the capital of {s}
        what city is the capital of {s}
        which city is {s}'s capital
        which city serves as the capital of {s}
        which city does {s} have as its capital
        in which city the government of {s} sits
        """,
        q="""
        what is the capital called in {s}
        in which city is the government of {s}
        what capital city does {s} have
        what capital does {s} have
        where is the capital of {s}
        """,
        e="""
        what the capital of {s} is
        what the capital city of {s} is called
        what {s}'s capital is
        where the capital of {s} is
        """,
        fill="""
        the capital of {s} is
        {s}'s capital city is
        {s} has its capital in
        """,
    )
    r.queries["en", "reverse"] = _query(
        "en",
        "{o} is the capital of {s}.",
        """
        {o} is the capital of {s}.
        {o} is the capital city of {s}.
        {o} is {s}'s capital.
        {o} serves as the capital of {s}.
        {o}, a capital city, belongs to {s}.
        The city of {o} is the capital of {s}.
        {o}: the capital of {s}.
        If you stand in {o}, you are in the capital of {s}.
        The country whose capital is {o} is {s}.
        {o} is where the government of {s} sits.
        """,
        np="""
        the country whose capital is {o}
        the country that has {o} as its capital
        the country with the capital {o}
        the country with the capital city {o}
        """,
        w="""
        which country has {o} as its capital
        what country has {o} as its capital
        which country has the capital {o}
        which country has {o} as its capital city
        which country's capital is {o}
        """,
        q="""
        {o} is the capital of which country
        {o} is the capital city of what country
        of which country is {o} the capital
        of what country is {o} the capital city
        """,
        e="""
        of which country {o} is the capital
        which country {o} is the capital of
        what country {o} is the capital of
        """,
        fill="""
        {o} is the capital of
        {o} is the capital city of
        """,
        followup="{o}",
    )
    r.queries["zh", "forward"] = _query(
        "zh",
        "{s}的首都是{o}。",
        """
        {s}的首都是{o}。
        {s}的首都城市是{o}。
        {s}的首都叫{o}。
        {s}的首都名叫{o}。
        {s}的首都就是{o}。
        {s}的首都位于{o}。
        {s}把首都设在{o}。
        {s}这个国家的首都是{o}。
        {s}的政府设在首都{o}。
        {s}:首都{o}。
        说到{s}的首都,那就是{o}。
        作为首都,{s}选择了{o}。
        去{s}的首都,就是去{o}。
        """,
        what="哪里",
        np="""
        {s}的首都
        {s}的首都名称
        {s}的首都城市
        {s}这个国家的首都
        {s}首都所在的城市
        """,
        q="""
        {s}的首都是哪里
        {s}的首都是哪座城市
        {s}的首都是哪个城市
        {s}的首都叫什么
        {s}的首都叫什么名字
        {s}的首都在哪里
        {s}的首都在哪座城市
        {s}把首都设在哪里
        {s}把首都设在哪座城市
        哪座城市是{s}的首都
        哪个城市是{s}的首都
        哪里是{s}的首都
        {s}这个国家的首都是哪里
        """,
        fill="""
        {s}的首都是
        {s}的首都叫
        {s}把首都设在
        """,
    )
    r.queries["zh", "reverse"] = _query(
        "zh",
        "{o}是{s}的首都。",
        """
        {o}是{s}的首都。
        {o}就是{s}的首都。
        {o}作为首都,属于{s}。
        {o}这座城市是{s}的首都。
        {o}:{s}的首都。
        以{o}为首都的国家是{s}。
        把首都设在{o}的国家是{s}。
        首都是{o}的国家叫{s}。
        """,
        what="哪个",
        np="""
        以{o}为首都的国家
        首都是{o}的国家
        把首都设在{o}的国家
        """,
        q="""
        {o}是哪个国家的首都
        {o}是哪国的首都
        {o}是什么国家的首都
        {o}这座城市是哪个国家的首都
        哪个国家的首都是{o}
        哪国的首都是{o}
        哪个国家以{o}为首都
        以{o}为首都的国家是哪个
        首都是{o}的国家是哪个
        """,
        fill="""
        {o}是首都,它所属的国家是
        以{o}为首都的国家是
        """,
        followup="{o}",
    )

    # ---- continent
    r = add(
        "continent",
        [{"en": (c[0], c[4]), "zh": (c[1], CONTINENTS_ZH[c[4]])} for c in countries if c[4] != "-"],
    )
    r.queries["en", "forward"] = _query(
        "en",
        "{s} is on the continent of {o}.",
        """
        {s} is on the continent of {o}.
        {s} lies on the continent of {o}.
        {s} lies in {o}.
        {s} is a country in {o}.
        {s} belongs to the continent of {o}.
        The continent of {s} is {o}.
        On the map you find {s} in {o}.
        {s} is located in {o}.
        {s}: a country in {o}.
        {s} is part of {o}.
        """,
        np="""
        the continent of {s}
        the continent where {s} is located
        the continent that {s} belongs to
        the continent on which {s} lies
        {s}'s continent
        """,
        w="""
        which continent is home to {s}
        which continent contains {s}
        """,
        q="""
        on which continent is {s}
        on what continent is {s}
        which continent is {s} on
        what continent is {s} in
        on which continent is {s} located
        on which continent does {s} lie
        which continent does {s} belong to
        in which part of the world is {s}
        what continent is {s} part of
        """,
        e="""
        on which continent {s} is
        which continent {s} is on
        which continent {s} belongs to
        on what continent {s} lies
        """,
        fill="""
        {s} is on the continent of
        {s} lies on the continent of
        the continent of {s} is
        """,
    )
    r.queries["zh", "forward"] = _query(
        "zh",
        "{s}位于{o}。",
        """
        {s}位于{o}。
        {s}在{o}。
        {s}属于{o}。
        {s}是{o}的一个国家。
        {s}坐落在{o}。
        {s}这个国家位于{o}。
        {s}所在的大洲是{o}。
        从地图上看,{s}在{o}。
        {s}:{o}国家。
        """,
        what="哪个",
        np="""
        {s}所在的大洲
        {s}所属的大洲
        {s}位于的大洲
        """,
        q="""
        {s}在哪个洲
        {s}在哪个大洲
        {s}位于哪个洲
        {s}位于哪个大洲
        {s}属于哪个洲
        {s}属于哪个大洲
        {s}坐落在哪个洲
        {s}是哪个洲的国家
        {s}是哪个大洲的国家
        {s}这个国家在哪个大洲
        {s}所在的大洲是哪个
        """,
        fill="""
        {s}位于
        {s}所在的大洲是
        {s}属于
        """,
    )

    # ---- language
    r = add(
        "language",
        [{"en": (c[0], c[5]), "zh": (c[1], LANGUAGES_ZH[c[5]])} for c in countries if c[5] != "-"],
    )
    r.queries["en", "forward"] = _query(
        "en",
        "People in {s} speak {o}.",
        """
        People in {s} speak {o}.
        Most people in {s} speak {o}.
        In {s} people speak {o}.
        The language of {s} is {o}.
        The main language of {s} is {o}.
        {s}'s language is {o}.
        The language spoken in {s} is {o}.
        {s} has the language {o}.
        Children in {s} grow up speaking {o}.
        In {s}, books and newspapers are written in {o}.
        The official language in {s} is {o}.
        """,
        np="""
        the language of {s}
        the main language of {s}
        the language spoken in {s}
        the language that people speak in {s}
        {s}'s main language
        the official language of {s}
        """,
        w="""
        which language is spoken in {s}
        what language is spoken in {s}
        which language is the main language of {s}
        """,
        q="""
        what language do people speak in {s}
        which language do people speak in {s}
        what do people in {s} speak
        which language do the people of {s} speak
        what language do most people in {s} use
        which language do children in {s} grow up speaking
        """,
        e="""
        what language people speak in {s}
        which language people in {s} speak
        which language the people of {s} use
        """,
        fill="""
        people in {s} speak
        the language of {s} is
        the main language spoken in {s} is
        """,
    )
    r.queries["zh", "forward"] = _query(
        "zh",
        "{s}人说{o}。",
        """
        {s}人说{o}。
        {s}人讲{o}。
        {s}人使用{o}。
        {s}的语言是{o}。
        {s}的官方语言是{o}。
        {s}的主要语言是{o}。
        在{s},人们说{o}。
        在{s},大多数人讲{o}。
        {s}的孩子从小说{o}。
        {s}的书报用{o}写成。
        """,
        np="""
        {s}的语言
        {s}的官方语言
        {s}的主要语言
        {s}人说的语言
        """,
        q="""
        {s}人说什么语言
        {s}人讲什么语言
        {s}人使用什么语言
        {s}人说哪种语言
        {s}人讲哪种语言
        {s}的官方语言是什么
        {s}的主要语言是什么
        在{s}人们说什么语言
        在{s}人们讲什么话
        在{s}大多数人说哪种语言
        {s}使用哪种语言
        """,
        fill="""
        {s}人说
        {s}的官方语言是
        在{s},人们说
        """,
    )

    # ---- currency
    r = add(
        "currency",
        [{"en": (c[0], c[6]), "zh": (c[1], CURRENCIES_ZH[c[6]])} for c in countries if c[6] != "-"],
    )
    r.queries["en", "forward"] = _query(
        "en",
        "The currency of {s} is the {o}.",
        """
        The currency of {s} is the {o}.
        The money of {s} is the {o}.
        {s}'s currency is the {o}.
        In {s} people pay with the {o}.
        People in {s} pay in the {o}.
        {s} uses the {o}.
        {s} uses as its currency the {o}.
        The money used in {s} is called the {o}.
        The currency used in {s} is the {o}.
        Shops in {s} take the {o}.
        """,
        np="""
        the currency of {s}
        {s}'s currency
        the money of {s}
        the currency used in {s}
        the money used in {s}
        the name of the currency of {s}
        """,
        w="""
        which currency is used in {s}
        what currency is used in {s}
        which money is used in {s}
        """,
        q="""
        what currency does {s} use
        which currency does {s} use
        what money does {s} use
        what currency do people use in {s}
        what do people in {s} pay with
        what is the money called in {s}
        with which currency do people pay in {s}
        """,
        e="""
        what currency {s} uses
        which currency people use in {s}
        what people in {s} pay with
        what the money of {s} is called
        """,
        fill="""
        the currency of {s} is the
        {s}'s currency is the
        in {s} people pay with the
        """,
    )
    r.queries["zh", "forward"] = _query(
        "zh",
        "{s}的货币是{o}。",
        """
        {s}的货币是{o}。
        {s}的货币叫{o}。
        {s}的钱叫{o}。
        {s}使用的货币是{o}。
        {s}使用{o}。
        {s}人用的钱是{o}。
        在{s},人们用{o}。
        在{s}买东西要付{o}。
        {s}的法定货币是{o}。
        """,
        np="""
        {s}的货币
        {s}的法定货币
        {s}使用的货币
        {s}货币的名称
        """,
        q="""
        {s}的货币是什么
        {s}的货币叫什么
        {s}的钱叫什么
        {s}的法定货币是什么
        {s}使用什么货币
        {s}用什么货币
        {s}使用哪种货币
        {s}人用什么钱
        在{s}用什么钱
        在{s}买东西要付什么钱
        在{s}人们用什么货币
        """,
        fill="""
        {s}的货币是
        {s}的货币叫
        {s}使用的货币是
        """,
    )

    # ---- chemical symbol
    r = add("symbol", [{"en": (e[0], e[2]), "zh": (e[1], e[2])} for e in elements], case=True)
    r.queries["en", "forward"] = _query(
        "en",
        "The chemical symbol of {s} is {o}.",
        """
        The chemical symbol of {s} is {o}.
        The symbol of {s} is {o}.
        The symbol for {s} is {o}.
        The chemical symbol for {s} is {o}.
        {s} has the symbol {o}.
        {s} has the chemical symbol {o}.
        {s} is written as {o}.
        Chemists write {s} as {o}.
        The element {s} has the symbol {o}.
        In the periodic table {s} is written {o}.
        {s}: symbol {o}.
        {s}'s symbol is {o}.
        """,
        np="""
        the chemical symbol of {s}
        the chemical symbol for {s}
        the symbol of {s}
        the symbol for {s}
        the symbol of the element {s}
        {s}'s chemical symbol
        the symbol for {s} in the periodic table
        """,
        w="""
        which symbol stands for {s}
        what symbol stands for {s}
        which chemical symbol stands for {s}
        """,
        q="""
        what symbol does {s} have
        which symbol does {s} have
        which chemical symbol does {s} have
        how do chemists write {s}
        how is {s} written in the periodic table
        how is the element {s} written
        """,
        e="""
        what symbol {s} has
        which chemical symbol {s} has
        how chemists write {s}
        how {s} is written in the periodic table
        """,
        fill="""
        the chemical symbol of {s} is
        the symbol for {s} is
        {s} has the symbol
        """,
    )
    r.queries["en", "reverse"] = _query(
        "en",
        "{o} is the chemical symbol of {s}.",
        """
        {o} is the chemical symbol of {s}.
        {o} is the symbol of {s}.
        {o} is the symbol for {s}.
        {o} stands for {s}.
        {o} stands for the element {s}.
        {o} means {s}.
        The symbol {o} stands for {s}.
        The element with the symbol {o} is {s}.
        In the periodic table {o} is {s}.
        """,
        np="""
        the element with the symbol {o}
        the element with the chemical symbol {o}
        the element that has the symbol {o}
        the element written as {o}
        """,
        w="""
        which element has the symbol {o}
        what element has the symbol {o}
        which element has the chemical symbol {o}
        which element is written as {o}
        """,
        q="""
        {o} is the symbol of which element
        {o} is the chemical symbol of what element
        which element does {o} stand for
        what does the symbol {o} stand for
        what element does the symbol {o} stand for
        """,
        e="""
        which element {o} stands for
        what element the symbol {o} stands for
        what the chemical symbol {o} stands for
        """,
        fill="""
        {o} is the chemical symbol of
        the symbol {o} stands for
        """,
        followup="{o}",
    )
    r.queries["zh", "forward"] = _query(
        "zh",
        "{s}的元素符号是{o}。",
        """
        {s}的元素符号是{o}。
        {s}的化学符号是{o}。
        {s}的符号是{o}。
        {s}元素的符号是{o}。
        {s}元素写作{o}。
        {s}用符号表示为{o}。
        在元素周期表中,{s}写作{o}。
        化学家把{s}写成{o}。
        {s}:元素符号{o}。
        """,
        np="""
        {s}的元素符号
        {s}的化学符号
        {s}的符号
        {s}元素的符号
        """,
        q="""
        {s}的元素符号是什么
        {s}的化学符号是什么
        {s}元素的符号是什么
        {s}的元素符号怎么写
        {s}的化学符号怎么写
        {s}元素写作什么
        {s}用什么符号表示
        {s}元素用什么符号表示
        什么符号表示{s}
        哪个符号表示{s}元素
        化学家把{s}写成什么
        """,
        fill="""
        {s}的元素符号是
        {s}的化学符号是
        {s}元素写作
        """,
    )
    r.queries["zh", "reverse"] = _query(
        "zh",
        "{o}是{s}的元素符号。",
        """
        {o}是{s}的元素符号。
        {o}是{s}的化学符号。
        {o}表示{s}。
        {o}代表元素{s}。
        符号{o}表示{s}。
        元素符号{o}代表{s}。
        符号为{o}的元素是{s}。
        写作{o}的元素是{s}。
        """,
        np="""
        符号为{o}的元素
        元素符号是{o}的元素
        写作{o}的元素
        """,
        q="""
        {o}是什么元素的符号
        {o}是哪个元素的符号
        {o}是哪种元素的化学符号
        {o}表示什么元素
        {o}代表什么元素
        {o}代表哪种元素
        元素符号{o}表示什么元素
        符号{o}代表哪个元素
        哪个元素的符号是{o}
        哪种元素写作{o}
        什么元素的化学符号是{o}
        """,
        fill="""
        元素符号{o}代表
        符号为{o}的元素是
        """,
        followup="{o}",
    )

    # ---- atomic number
    r = add(
        "atomic_number",
        [{"en": (e[0], e[3]), "zh": (e[1], e[3])} for e in elements if e[3] != "-"],
        numeric=True,
    )
    r.queries["en", "forward"] = _query(
        "en",
        "The atomic number of {s} is {o}.",
        """
        The atomic number of {s} is {o}.
        {s} has the atomic number {o}.
        {s}'s atomic number is {o}.
        The number of protons in {s} is {o}.
        Each atom of {s} has a number of protons equal to {o}.
        In the periodic table {s} has number {o}.
        In the periodic table {s} stands at number {o}.
        {s} is element number {o}.
        The element {s} has atomic number {o}.
        {s}: atomic number {o}.
        """,
        np="""
        the atomic number of {s}
        {s}'s atomic number
        the atomic number of the element {s}
        the number of protons in {s}
        the number of {s} in the periodic table
        """,
        w="""
        which atomic number belongs to {s}
        which number belongs to {s} in the periodic table
        """,
        q="""
        what atomic number does {s} have
        which atomic number does {s} have
        which number does {s} have in the periodic table
        how many protons does {s} have
        how many protons are in an atom of {s}
        at which number does {s} stand in the periodic table
        """,
        e="""
        what atomic number {s} has
        how many protons {s} has
        which number {s} has in the periodic table
        """,
        fill="""
        the atomic number of {s} is
        {s} has the atomic number
        {s} is element number
        """,
    )
    r.queries["zh", "forward"] = _query(
        "zh",
        "{s}的原子序数是{o}。",
        """
        {s}的原子序数是{o}。
        {s}的原子序数为{o}。
        {s}元素的原子序数是{o}。
        {s}的质子数是{o}。
        {s}原子的质子数等于{o}。
        在元素周期表中,{s}的序号是{o}。
        {s}在元素周期表中排第{o}。
        {s}:原子序数{o}。
        """,
        what="多少",
        np="""
        {s}的原子序数
        {s}元素的原子序数
        {s}的质子数
        {s}在元素周期表中的序号
        """,
        q="""
        {s}的原子序数是多少
        {s}的原子序数是几
        {s}元素的原子序数是多少
        {s}的质子数是多少
        {s}有多少个质子
        {s}原子有几个质子
        {s}在元素周期表中的序号是多少
        {s}在元素周期表中排第几
        {s}在周期表里排第几
        """,
        fill="""
        {s}的原子序数是
        {s}的质子数是
        {s}在元素周期表中排第
        """,
    )

    # ---- class of animal
    r = add(
        "animal_class",
        [{"en": (a[0], a[2]), "zh": (a[1], CLASSES_ZH[a[2]])} for a in animals if a[2] != "-"],
    )
    r.queries["en", "forward"] = _query(
        "en",
        "A {s} is a {o}.",
        """
        A {s} is a {o}.
        The {s} is a {o}.
        The class of the {s}: {o}.
        A {s} is a kind of {o}.
        The {s} is a type of {o}.
        The {s} is counted as a kind of {o}.
        Biologists say that the {s} is a kind of {o}.
        Among the animals, the {s} is a type of {o}.
        """,
        np="""
        the class of the {s}
        the class of animals that the {s} belongs to
        the animal class of the {s}
        the kind of animal that a {s} is
        """,
        w="""
        which class of animals includes the {s}
        which animal class includes the {s}
        """,
        q="""
        what class does the {s} belong to
        which class does a {s} belong to
        which class of animals does the {s} belong to
        what kind of animal is the {s}
        what kind of animal is a {s}
        what type of animal is a {s}
        which type of animal is the {s}
        to which class does the {s} belong
        """,
        e="""
        what kind of animal a {s} is
        which class the {s} belongs to
        what type of animal the {s} is
        """,
        fill="""
        the {s} is a kind of
        the {s} is a type of
        """,
        followup="the {s}",
    )
    r.queries["zh", "forward"] = _query(
        "zh",
        "{s}属于{o}。",
        """
        {s}属于{o}。
        {s}是{o}。
        {s}是一种{o}。
        {s}这种动物属于{o}。
        在动物分类中,{s}属于{o}。
        生物学家把{s}归为{o}。
        {s}的类别是{o}。
        """,
        np="""
        {s}的类别
        {s}所属的动物类别
        {s}这种动物的类别
        """,
        q="""
        {s}属于哪类动物
        {s}属于哪一类动物
        {s}属于什么动物
        {s}属于哪一类
        {s}是哪类动物
        {s}是什么类别的动物
        {s}是哪一种动物
        {s}这种动物属于哪一类
        在动物分类中{s}属于哪类
        {s}归为哪类动物
        """,
        fill="""
        {s}属于
        {s}是一种
        """,
    )

    # ---- young animals (English)
    r = add("young", [{"en": (a[0], a[3])} for a in animals if a[3] != "-"])
    r.queries["en", "forward"] = _query(
        "en",
        "A young {s} is called a {o}.",
        """
        A young {s} is called a {o}.
        A baby {s} is called a {o}.
        A young {s} has the name {o}.
        The young of the {s} is called a {o}.
        The baby of the {s} is a {o}.
        People call a baby {s} a {o}.
        The word for a young {s} is {o}.
        The name of a young {s} is {o}.
        The {s} looks after its young, the {o}.
        """,
        np="""
        the name of a young {s}
        the name of a baby {s}
        the word for a young {s}
        the word for a baby {s}
        the name for the young of the {s}
        """,
        w="""
        which word means a young {s}
        which word is used for a baby {s}
        """,
        q="""
        what is a young {s} called
        what is a baby {s} called
        what do you call a baby {s}
        what do you call a young {s}
        what do people call a baby {s}
        how do we call the young of the {s}
        """,
        e="""
        what a young {s} is called
        what a baby {s} is called
        what people call a young {s}
        """,
        fill="""
        a young {s} is called a
        a baby {s} is called a
        """,
        followup="a {s}",
    )
    r.queries["en", "reverse"] = _query(
        "en",
        "A {o} is a young {s}.",
        """
        A {o} is a young {s}.
        A {o} is a baby {s}.
        A {o} is the young of a {s}.
        A {o} grows up to be a {s}.
        One day a {o} becomes a {s}.
        """,
        np="""
        the animal whose baby is called a {o}
        the animal whose young is called a {o}
        the animal that a {o} becomes
        """,
        w="""
        which animal has a baby called a {o}
        which animal's young is called a {o}
        """,
        q="""
        a {o} is the young of which animal
        a {o} is the baby of which animal
        which animal does a {o} become
        what does a {o} grow up to be
        """,
        e="""
        which animal a {o} becomes
        what a {o} grows up to be
        """,
        fill="""
        a {o} is a young
        a {o} grows up to be a
        """,
        followup="a {o}",
    )

    # ---- planets
    planets = rows(PLANETS)
    r = add(
        "planet_order",
        [{"en": (p[0], ORDINALS[int(p[2])]), "zh": (p[1], f"第{DIGITS_ZH[int(p[2])]}")} for p in planets],
    )
    r.queries["en", "forward"] = _query(
        "en",
        "{s} is the {o} planet from the sun.",
        """
        {s} is the {o} planet from the sun.
        {s} is the {o} planet.
        {s}'s place counted from the sun is the {o}.
        Counted from the sun, {s} is the {o}.
        Counting planets from the sun, {s} comes {o}.
        Among the planets, {s} is the {o}.
        Of all planets {s} is the {o}.
        From the sun, {s} comes {o}.
        The place of {s} among the planets is the {o}.
        In the order of the planets {s} is {o}.
        """,
        np="""
        the place of {s} counted from the sun
        the place of {s} among the planets
        {s}'s place in the order of the planets
        """,
        w="""
        which place counted from the sun belongs to {s}
        """,
        q="""
        which place does {s} have counted from the sun
        what place does {s} have among the planets
        which planet from the sun is {s}
        where does {s} come in the order of the planets
        counted from the sun, which planet is {s}
        """,
        e="""
        which planet from the sun {s} is
        which place {s} has among the planets
        where {s} comes in the order of the planets
        """,
        fill="""
        counted from the sun, {s} is the
        among the planets, {s} is the
        """,
    )
    r.queries["zh", "forward"] = _query(
        "zh",
        "从太阳数起,{s}排{o}。",
        """
        从太阳数起,{s}排{o}。
        从太阳往外数,{s}排{o}。
        离太阳由近到远,{s}排{o}。
        在八大行星中,{s}排{o}。
        {s}在行星中排{o}。
        {s}的行星顺序是{o}。
        """,
        what="第几",
        np="""
        {s}在行星中的顺序
        {s}在八大行星中的顺序
        """,
        q="""
        从太阳数起{s}排第几
        从太阳往外数{s}排第几
        离太阳由近到远{s}排第几
        {s}在行星中排第几
        {s}在八大行星中排第几
        {s}离太阳排第几
        {s}的行星顺序是第几
        """,
        fill="""
        从太阳数起,{s}排
        在八大行星中,{s}排
        """,
    )

    # ---- inventor
    r = add("inventor", [{"en": (i[0], i[2]), "zh": (i[1], i[3])} for i in rows(INVENTIONS)])
    r.queries["en", "forward"] = _query(
        "en",
        "The {s} was invented by {o}.",
        """
        The {s} was invented by {o}.
        The {s} was created by {o}.
        The {s} is an invention of {o}.
        The {s} is the work of {o}.
        The inventor of the {s} is {o}.
        The inventor of the {s} was {o}.
        The creator of the {s} was {o}.
        The person behind the {s} is {o}.
        The person who invented the {s} was {o}.
        For the {s} we thank its inventor, {o}.
        The {s}: invented by {o}.
        {o} invented the {s}.
        {o} is the inventor of the {s}.
        """,
        what="who",
        np="""
        the inventor of the {s}
        the creator of the {s}
        the person behind the {s}
        """,
        w="""
        who invented the {s}
        who created the {s}
        who is the inventor of the {s}
        who was the inventor of the {s}
        who was the creator of the {s}
        which person invented the {s}
        who is the person who invented the {s}
        which inventor created the {s}
        """,
        q="""
        by whom was the {s} invented
        by whom was the {s} created
        whose invention is the {s}
        """,
        e="""
        who the inventor of the {s} was
        by whom the {s} was invented
        whose invention the {s} is
        """,
        fill="""
        the {s} was invented by
        the inventor of the {s} was
        the {s} was created by
        """,
        followup="the {s}",
    )
    r.queries["zh", "forward"] = _query(
        "zh",
        "{s}的发明者是{o}。",
        """
        {s}的发明者是{o}。
        {s}的发明人是{o}。
        {s}是由{o}发明的。
        {s}由{o}发明。
        {s}是谁的发明?是{o}的发明。
        {s}的创造者是{o}。
        发明{s}的人是{o}。
        {s}这项发明来自{o}。
        {o}发明了{s}。
        {o}是{s}的发明者。
        """,
        what="谁",
        np="""
        {s}的发明者
        {s}的发明人
        {s}的创造者
        发明{s}的人
        """,
        q="""
        {s}是谁发明的
        {s}是由谁发明的
        {s}由谁发明
        {s}的发明者是谁
        {s}的发明人是谁
        {s}的创造者是谁
        谁发明了{s}
        谁是{s}的发明者
        谁是{s}的发明人
        发明{s}的人是谁
        {s}这项发明来自谁
        """,
        fill="""
        {s}的发明者是
        {s}的发明人是
        发明{s}的人是
        """,
    )

    # ---- author
    r = add("author", [{"en": (b[0], b[2]), "zh": (b[1], b[3])} for b in rows(BOOKS)])
    r.queries["en", "forward"] = _query(
        "en",
        "{s} was written by {o}.",
        """
        {s} was written by {o}.
        The book {s} was written by {o}.
        The author of {s} is {o}.
        The author of the book {s} is {o}.
        The writer of {s} is {o}.
        The person who wrote {s} is {o}.
        {s} is a work by {o}.
        {s} is a book by {o}.
        {s} comes from the pen of {o}.
        {o} wrote {s}.
        {o} is the author of {s}.
        """,
        what="who",
        np="""
        the author of {s}
        the author of the book {s}
        the writer of {s}
        the writer of the book {s}
        """,
        w="""
        who wrote {s}
        who wrote the book {s}
        who is the author of {s}
        who is the writer of {s}
        which author wrote {s}
        which writer wrote {s}
        who is the person who wrote {s}
        """,
        q="""
        by whom was {s} written
        by whom was the book {s} written
        whose book is {s}
        whose work is {s}
        """,
        e="""
        who the author of {s} is
        by whom {s} was written
        whose work {s} is
        """,
        fill="""
        {s} was written by
        the author of {s} is
        the writer of {s} is
        """,
    )
    r.queries["zh", "forward"] = _query(
        "zh",
        "{s}的作者是{o}。",
        """
        {s}的作者是{o}。
        {s}是{o}写的。
        {s}是{o}的作品。
        {s}由{o}所写。
        {s}这本书的作者是{o}。
        {s}出自作家{o}。
        写{s}的人是{o}。
        写出{s}的作家是{o}。
        {o}写了{s}。
        {o}是{s}的作者。
        """,
        what="谁",
        np="""
        {s}的作者
        {s}这本书的作者
        写{s}的人
        写出{s}的作家
        """,
        q="""
        {s}的作者是谁
        {s}的作者叫什么名字
        {s}是谁写的
        {s}是谁的作品
        {s}由谁所写
        {s}这本书是谁写的
        {s}出自哪位作家
        {s}是哪位作家写的
        {s}是哪位作家的作品
        谁写了{s}
        谁是{s}的作者
        写{s}的人是谁
        """,
        fill="""
        {s}的作者是
        {s}出自作家
        写{s}的人是
        """,
    )

    # ---- landmark
    r = add("landmark", [{"en": (p[0], p[2]), "zh": (p[1], p[3])} for p in rows(LANDMARKS)])
    r.queries["en", "forward"] = _query(
        "en",
        "The {s} is in the city of {o}.",
        """
        The {s} is in the city of {o}.
        The {s} is in {o}.
        The {s} stands in {o}.
        The {s} stands in the city of {o}.
        The {s} can be found in {o}.
        You can visit the {s} in {o}.
        Tourists see the {s} in {o}.
        The city of the {s} is {o}.
        The home of the {s} is {o}.
        The {s} is a famous sight of {o}.
        {o} is the home of the {s}.
        """,
        np="""
        the city of the {s}
        the city where the {s} stands
        the city where the {s} is
        the home of the {s}
        the city where tourists see the {s}
        """,
        w="""
        which city is the home of the {s}
        which city has the {s}
        what city has the {s}
        """,
        q="""
        where is the {s}
        in which city is the {s}
        in what city is the {s}
        in which city does the {s} stand
        where does the {s} stand
        where can you visit the {s}
        where can I see the {s}
        which city is the {s} in
        in which city can you find the {s}
        """,
        e="""
        where the {s} is
        in which city the {s} is
        in which city the {s} stands
        which city the {s} is in
        where to find the {s}
        """,
        fill="""
        the {s} is in the city of
        the {s} stands in
        you can visit the {s} in
        """,
        followup="the {s}",
    )
    r.queries["zh", "forward"] = _query(
        "zh",
        "{s}在{o}这座城市。",
        """
        {s}在{o}这座城市。
        {s}在{o}。
        {s}位于{o}。
        {s}坐落在{o}。
        {s}所在的城市是{o}。
        {s}是{o}的著名景点。
        游客可以在{o}看到{s}。
        要参观{s},就去{o}。
        想看{s}要去{o}。
        {o}有{s}。
        """,
        what="哪里",
        np="""
        {s}所在的城市
        {s}位于的城市
        有{s}的城市
        """,
        q="""
        {s}在哪里
        {s}在哪座城市
        {s}在哪个城市
        {s}位于哪座城市
        {s}位于哪个城市
        {s}坐落在哪里
        {s}坐落在哪座城市
        {s}所在的城市是哪座
        {s}是哪座城市的著名景点
        哪座城市有{s}
        要参观{s}去哪座城市
        想看{s}要去哪里
        在哪个城市可以看到{s}
        """,
        fill="""
        {s}所在的城市是
        要参观{s},就去
        {s}坐落在
        """,
    )

    # ---- words
    r = add("word", [{"en": (w[0], w[1]), "zh": (w[1], w[0])} for w in rows(WORDS)])
    r.queries["en", "forward"] = _query(
        "en",
        'The Chinese word for "{s}" is {o}.',
        """
        The Chinese word for "{s}" is {o}.
        The English word "{s}" is {o} in Chinese.
        In Chinese, "{s}" is {o}.
        In Chinese people say {o} for "{s}".
        "{s}" means {o} in Chinese.
        "{s}" translated into Chinese is {o}.
        The Chinese translation of "{s}" is {o}.
        The Chinese for "{s}" is {o}.
        """,
        np="""
        the Chinese word for "{s}"
        the Chinese for "{s}"
        the Chinese translation of "{s}"
        "{s}" in Chinese
        the word for "{s}" in Chinese
        """,
        w="""
        which Chinese word means "{s}"
        what Chinese word means "{s}"
        how to say "{s}" in Chinese
        """,
        q="""
        how do you say "{s}" in Chinese
        how do I say "{s}" in Chinese
        how do people say "{s}" in Chinese
        what does "{s}" mean in Chinese
        how is "{s}" translated into Chinese
        """,
        e="""
        how people say "{s}" in Chinese
        what "{s}" means in Chinese
        how "{s}" is translated into Chinese
        """,
        fill="""
        the Chinese word for "{s}" is
        in Chinese, "{s}" is
        """,
        followup='"{s}"',
    )
    r.queries["zh", "forward"] = _query(
        "zh",
        "“{s}”的英文是 {o}。",
        """
        “{s}”的英文是 {o}。
        “{s}”的英语是 {o}。
        “{s}”用英语说是 {o}。
        “{s}”用英文写作 {o}。
        “{s}”翻译成英语是 {o}。
        “{s}”翻译成英文是 {o}。
        “{s}”的英语单词是 {o}。
        中文词“{s}”对应的英文词是 {o}。
        英语里说“{s}”是 {o}。
        英语单词 {o} 的意思是“{s}”。
        """,
        np="""
        “{s}”的英文
        “{s}”的英语
        “{s}”的英语单词
        “{s}”对应的英文词
        “{s}”的英文翻译
        """,
        q="""
        “{s}”用英语怎么说
        “{s}”用英文怎么说
        “{s}”用英文怎么写
        “{s}”的英文是什么
        “{s}”的英语是什么
        “{s}”的英语单词是什么
        “{s}”的英文怎么说
        “{s}”翻译成英语是什么
        “{s}”翻译成英文怎么说
        英语里“{s}”怎么说
        英文里“{s}”怎么写
        怎么用英语说“{s}”
        """,
        fill="""
        “{s}”的英文是
        “{s}”翻译成英语是
        """,
        followup="“{s}”",
    )

    # ---- months (English)
    r = add("month_order", [{"en": (m, ORDINALS[i + 1])} for i, m in enumerate(MONTHS)])
    r.queries["en", "forward"] = _query(
        "en",
        "{s} is the {o} month of the year.",
        """
        {s} is the {o} month of the year.
        {s} is the {o} month.
        In the calendar {s} is the {o}.
        Among the months, {s} is the {o}.
        The place of {s} in the year is the {o}.
        In the year, {s} comes {o}.
        Counting the months, {s} is the {o}.
        """,
        np="""
        the place of {s} in the year
        the place of {s} among the months
        the place of {s} in the calendar
        """,
        w="""
        which place in the year belongs to {s}
        which month of the year is {s}
        """,
        q="""
        which month is {s} in the calendar
        which place does {s} have among the months
        where does {s} come in the year
        what number is the month {s}
        """,
        e="""
        where {s} comes in the year
        which place {s} has among the months
        what number the month {s} is
        """,
        fill="""
        in the year, {s} comes
        among the months, {s} is the
        """,
    )

    # ---- units and counts
    r = add("count", [{"en": (f"{u[0]}/{u[2]}", u[4]), "zh": (f"{u[1]}/{u[3]}", u[4])} for u in rows(UNITS)],
            numeric=True)  # fmt: skip
    r.queries["en", "forward"] = _query(
        "en",
        "{as} has {o} {p}.",
        """
        The number of {p} in {as} is {o}.
        The number of {p} that {as} has is {o}.
        For {as}, the number of {p} is {o}.
        {as}: {o} {p}.
        {as} has {o} {p}.
        {as} has exactly {o} {p}.
        There are {o} {p} in {as}.
        In {as} there are {o} {p}.
        """,
        np="""
        the number of {p} in {as}
        the number of {p} that {as} has
        """,
        w="""
        how many {p} are in {as}
        how many {p} make {as}
        how many {p} belong to {as}
        """,
        q="""
        how many {p} does {as} have
        how many {p} are there in {as}
        {as} has how many {p}
        what number of {p} does {as} have
        """,
        e="""
        how many {p} {as} has
        how many {p} there are in {as}
        """,
        fill="""
        the number of {p} in {as} is
        the number of {p} that {as} has is
        """,
    )
    r.queries["zh", "forward"] = _query(
        "zh",
        "{s}有{o}{p}。",
        """
        {s}有{o}{p}。
        {s}共有{o}{p}。
        {s}一共有{o}{p}。
        {s}正好有{o}{p}。
        大家都知道{s}有{o}{p}。
        """,
        q="""
        {s}有多少{p}
        {s}有几{p}
        {s}共有多少{p}
        {s}共有几{p}
        {s}一共有多少{p}
        {s}一共有几{p}
        {s}正好有多少{p}
        多少{p}组成{s}
        """,
        fill="""
        {s}有
        {s}一共有
        """,
    )

    # ---- instruments
    r = add("measures", [{"en": (i[0], i[1])} for i in rows(INSTRUMENTS)])
    r.queries["en", "forward"] = _query(
        "en",
        "A {s} measures {o}.",
        """
        A {s} measures {o}.
        A {s} is used to measure {o}.
        With a {s} you can measure {o}.
        People use a {s} to measure {o}.
        A {s} is an instrument for {o}.
        A {s} shows {o}.
        The {s} is made for measuring {o}.
        What a {s} measures is {o}.
        """,
        np="""
        the thing that a {s} measures
        the use of a {s}
        the quantity that a {s} measures
        """,
        w="""
        which quantity is measured with a {s}
        what is measured with a {s}
        what is measured by a {s}
        """,
        q="""
        what does a {s} measure
        which quantity does a {s} measure
        what do people measure with a {s}
        what can you measure with a {s}
        what is a {s} used for
        what does a {s} show
        """,
        e="""
        what a {s} measures
        what people measure with a {s}
        what a {s} is used for
        """,
        fill="""
        a {s} measures
        a {s} is used to measure
        with a {s} you can measure
        """,
        followup="a {s}",
    )

    # ---- opposites (English)
    r = add("opposite_en", [{"en": (w[0], w[1])} for w in rows(OPPOSITES_EN)], symmetric=True)
    for direction, s, o in (("forward", "{s}", "{o}"), ("reverse", "{o}", "{s}")):
        r.queries["en", direction] = _query(
            "en",
            f'The opposite of "{s}" is "{o}".',
            f"""
            The opposite of "{s}" is "{o}".
            The opposite of the word "{s}" is "{o}".
            The word "{s}" has the opposite "{o}".
            "{s}" is the opposite of "{o}".
            The contrary of "{s}" is "{o}".
            "{s}" and "{o}" are opposites.
            Not "{s}" but "{o}": these words are opposites.
            """,
            np=f"""
            the opposite of "{s}"
            the opposite of the word "{s}"
            the opposite word of "{s}"
            the contrary of "{s}"
            a word that means the opposite of "{s}"
            """,
            w=f"""
            which word is the opposite of "{s}"
            what word is the opposite of "{s}"
            which word means the opposite of "{s}"
            which word is the contrary of "{s}"
            """,
            q=f"""
            what opposite does the word "{s}" have
            what opposite does "{s}" have
            "{s}" is the opposite of which word
            """,
            e=f"""
            what the opposite of "{s}" is
            what the opposite word of "{s}" is
            """,
            fill=f"""
            the opposite of "{s}" is
            the word "{s}" has the opposite
            """,
            followup=f'"{s}"',
        )

    # ---- past tense (English)
    r = add("past", [{"en": (w[0], w[1])} for w in rows(PASTS)])
    r.queries["en", "forward"] = _query(
        "en",
        'The past tense of "{s}" is "{o}".',
        """
        The past tense of "{s}" is "{o}".
        The past tense of the verb "{s}" is "{o}".
        The past form of "{s}" is "{o}".
        The verb "{s}" has the past tense "{o}".
        In the past tense, "{s}" becomes "{o}".
        Today we {s}, yesterday we {o}.
        Now I {s}; last week I {o}.
        """,
        np="""
        the past tense of "{s}"
        the past tense of the verb "{s}"
        the past form of "{s}"
        the past form of the verb "{s}"
        """,
        w="""
        which word is the past tense of "{s}"
        which word is the past form of "{s}"
        """,
        q="""
        what past tense does "{s}" have
        what past tense does the verb "{s}" have
        what does "{s}" become in the past tense
        how do you write "{s}" in the past tense
        """,
        e="""
        what the past tense of "{s}" is
        what "{s}" becomes in the past tense
        """,
        fill="""
        the past tense of "{s}" is
        in the past tense, "{s}" becomes
        """,
        followup='"{s}"',
    )

    # ---- opposites (Chinese)
    r = add("opposite_zh", [{"zh": (w[0], w[1])} for w in rows(OPPOSITES_ZH)], symmetric=True)
    for direction, s, o in (("forward", "{s}", "{o}"), ("reverse", "{o}", "{s}")):
        r.queries["zh", direction] = _query(
            "zh",
            f"“{s}”的反义词是“{o}”。",
            f"""
            “{s}”的反义词是“{o}”。
            “{s}”的反义词就是“{o}”。
            “{s}”这个词的反义词是“{o}”。
            “{s}”的相反词是“{o}”。
            和“{s}”相反的词是“{o}”。
            与“{s}”意思相反的词是“{o}”。
            “{s}”和“{o}”是一对反义词。
            """,
            np=f"""
            “{s}”的反义词
            “{s}”这个词的反义词
            “{s}”的相反词
            和“{s}”相反的词
            与“{s}”意思相反的词
            """,
            q=f"""
            “{s}”的反义词是什么
            “{s}”的反义词是哪个词
            “{s}”这个词的反义词是什么
            “{s}”的相反词是什么
            和“{s}”相反的词是什么
            和“{s}”意思相反的词是哪个
            与“{s}”意思相反的词是什么
            哪个词是“{s}”的反义词
            什么词和“{s}”意思相反
            """,
            fill=f"""
            “{s}”的反义词是
            和“{s}”相反的词是
            """,
            followup=f"“{s}”",
        )

    # ---- measure words (Chinese)
    r = add("measure_zh", [{"zh": (w[0], w[1])} for w in rows(MEASURES_ZH)])
    r.queries["zh", "forward"] = _query(
        "zh",
        "“{s}”的量词是“{o}”。",
        """
        “{s}”的量词是“{o}”。
        “{s}”用的量词是“{o}”。
        “{s}”常用的量词是“{o}”。
        “{s}”这个词的量词是“{o}”。
        说“{s}”时,量词用“{o}”。
        我们说一{o}{s},两{o}{s}。
        这里有三{o}{s}。
        """,
        np="""
        “{s}”的量词
        “{s}”用的量词
        “{s}”常用的量词
        “{s}”这个词的量词
        """,
        q="""
        “{s}”的量词是什么
        “{s}”的量词是哪个字
        “{s}”用什么量词
        “{s}”用哪个量词
        “{s}”常用什么量词
        “{s}”常用的量词是什么
        “{s}”这个词的量词是什么
        说“{s}”时用什么量词
        说“{s}”时量词用什么
        """,
        fill="""
        “{s}”的量词是
        “{s}”常用的量词是
        """,
        followup="“{s}”",
    )

    # ---- poems (Chinese)
    r = add("poem_zh", [{"zh": (w[0], w[1])} for w in rows(POEMS_ZH)])
    r.queries["zh", "forward"] = _query(
        "zh",
        "古诗{s}的作者是诗人{o}。",
        """
        古诗{s}的作者是诗人{o}。
        {s}的作者是诗人{o}。
        {s}是诗人{o}写的。
        {s}是诗人{o}的作品。
        {s}这首诗的作者是诗人{o}。
        {s}这首诗出自诗人{o}。
        写{s}的诗人是{o}。
        诗人{o}写了{s}。
        """,
        what="谁",
        np="""
        古诗{s}的作者
        {s}这首诗的作者
        写{s}的诗人
        写古诗{s}的诗人
        """,
        q="""
        古诗{s}的作者是谁
        {s}这首诗的作者是谁
        古诗{s}是谁写的
        {s}这首诗是谁写的
        {s}是哪位诗人写的
        {s}是哪位诗人的作品
        {s}这首诗出自谁
        哪位诗人写了{s}
        谁是古诗{s}的作者
        写{s}的诗人是谁
        """,
        fill="""
        古诗{s}的作者是
        写{s}的诗人是
        """,
    )
    return relations


# --------------------------------------------------------------------------------------------------------
# Frames: what goes around a core. The last ~20 % (by hash) are held out.
# --------------------------------------------------------------------------------------------------------

FRAMES_EN = {
    # around a direct question (kinds w and q)
    "q": _lines("""
        {Q}?
        {Q}?
        {Q}
        Please tell me: {q}?
        Tell me, {q}?
        Question: {q}?
        Quick question: {q}?
        A question for you: {q}?
        I have a question. {Q}?
        Hi, {q}?
        Hello! {Q}?
        Hey, {q}?
        Please answer: {q}?
        Please answer my question: {q}?
        Answer this question: {q}?
        {Q}? Please tell me.
        {Q}? Thanks.
        {Q}? Thank you!
        {Q}? I forgot.
        {Q}? I want to know.
        Excuse me, {q}?
        So {q}?
        Now tell me: {q}?
        One more question: {q}?
        My teacher asked: {q}?
        Help me, please. {Q}?
        Do you know? {Q}?
        """),
    # around a noun phrase
    "np": _lines("""
        {What} is {np}?
        {What} is {np}?
        {What}'s {np}?
        Tell me {np}.
        Please tell me {np}.
        Can you tell me {np}?
        Could you tell me {np}?
        Could you please tell me {np}?
        Do you know {np}?
        I want to know {np}.
        I would like to know {np}.
        Name {np}.
        Please name {np}.
        Give me {np}.
        Please give me {np}.
        I forgot {np}. Please tell me.
        I forgot {np}. Can you help?
        {Np}?
        {Np}, please.
        Hi, {what} is {np}?
        Hello! {What} is {np}?
        Please answer: {what} is {np}?
        Question: {what} is {np}?
        Quick question: {what} is {np}?
        I have a question. {What} is {np}?
        {What} is {np}? Thanks.
        Do you remember {np}?
        My question is about {np}.
        """),
    # around an embedded clause (kinds w and e)
    "e": _lines("""
        Do you know {e}?
        Do you know {e}?
        Can you tell me {e}?
        Could you tell me {e}?
        Could you please tell me {e}?
        Tell me {e}.
        Please tell me {e}.
        I want to know {e}.
        I would like to know {e}.
        I wonder {e}.
        I forgot {e}. Please tell me.
        I forgot {e}. Can you help?
        Do you remember {e}?
        Please say {e}.
        Hi, can you tell me {e}?
        Hello! Do you know {e}?
        Help me, please. I want to know {e}.
        My teacher asked me {e}.
        """),
    "fill": _lines("""
        {Fill} ...
        {Fill} what?
        Complete the sentence: {fill} ...
        Please complete: {fill} ...
        Complete this: {fill}
        Finish the sentence: {fill} ...
        Please finish this sentence: {fill} ...
        Fill in the blank: {fill} ___.
        Fill in: {fill} ___.
        """),
}
FRAMES_ZH = {
    "q": _lines("""
        {q}?
        {q}?
        {q}
        请问{q}?
        请问,{q}?
        请告诉我{q}。
        告诉我{q}。
        你知道{q}吗?
        我想知道{q}。
        我想问一下,{q}?
        问一下,{q}?
        你好,{q}?
        你好,请问{q}?
        请回答:{q}?
        请回答我的问题:{q}?
        回答这个问题:{q}?
        问题:{q}?
        我有一个问题:{q}?
        有个问题,{q}?
        能告诉我{q}吗?
        你能告诉我{q}吗?
        可以告诉我{q}吗?
        {q}?谢谢。
        {q}?请告诉我。
        {q}?我忘了。
        老师问我{q}。
        我忘了{q},请告诉我。
        我想了解{q}。
        你记得{q}吗?
        再问一个问题:{q}?
        那么{q}?
        """),
    "np": _lines("""
        {np}是{what}?
        请告诉我{np}。
        告诉我{np}。
        你知道{np}吗?
        我想知道{np}。
        能告诉我{np}吗?
        你能告诉我{np}吗?
        可以告诉我{np}吗?
        说出{np}。
        请说出{np}。
        {np}?
        {np}呢?
        请问{np}是{what}?
        你好,{np}是{what}?
        你好,请告诉我{np}。
        我忘了{np},请告诉我。
        我想了解{np}。
        你记得{np}吗?
        请回答:{np}是{what}?
        问题:{np}是{what}?
        """),
    "fill": _lines("""
        {fill}……
        {fill}什么?
        请补全:{fill}……
        补全句子:{fill}……
        请把句子补充完整:{fill}……
        请完成句子:{fill}……
        完成句子:{fill}……
        填空:{fill}___。
        请填空:{fill}___。
        """),
}

# a heading before a sentence
HEADINGS = {
    "en": ["{Np}. ", "{Np}: ", "Topic: {np}. ", "About {np}. ", "Today's topic is {np}. ", "{Np}\n",
           "This is about {np}. ", "Let us look at {np}. ", "Here is {np}. "],
    "zh": ["{np}。", "{np}:", "主题:{np}。", "关于{np}。", "今天的主题是{np}。", "{np}\n",
           "下面介绍{np}。", "我们来看{np}。", "谈到{np}。"],
}  # fmt: skip
AGAIN = {
    "en": [" {st}", " In other words: {st}", " Again: {st}", " That is to say: {st}", "\n{st}"],
    "zh": ["{st}", "换句话说，{st}", "也就是说，{st}", "再说一遍：{st}", "\n{st}"],
}

# around a statement in running text
WRAPS_EN = _lines("""
    {St}
    {St}
    {St}
    {St}
    {St}
    Remember: {St}
    Note: {St}
    Fact: {St}
    Did you know? {St}
    We learned this today. {St}
    Everyone knows it: {st}
    The teacher said: {St}
    It is true that {st}
    It is known that {st}
    My friend told me that {st}
    The book says that {st}
    I read that {st}
    """)
WRAPS_ZH = _lines("""
    {st}
    {st}
    {st}
    {st}
    {st}
    记住:{st}
    请记住,{st}
    知识点:{st}
    你知道吗?{st}
    老师说,{st}
    书上说,{st}
    大家都知道,{st}
    众所周知,{st}
    我们今天学到,{st}
    我读到过,{st}
    朋友告诉我,{st}
    """)


# --------------------------------------------------------------------------------------------------------
# Filling the slots
# --------------------------------------------------------------------------------------------------------


def upper_first(text: str) -> str:
    """Capitalise the first letter, also behind an opening quote; leaves everything else alone."""
    return text[:1].upper() + text[1:]


_WIDE = str.maketrans({",": "，", ":": "：", ";": "；", "?": "？", "!": "！"})


def full_width(text: str) -> str:
    """Chinese sentences carry full-width punctuation; the tables above are typed with the ASCII signs."""
    return text.translate(_WIDE)


def clean_zh(text: str, language: str) -> str:
    """Full-width punctuation for Chinese sentences; bare expressions like "3 + 4 = ?" stay as they are."""
    return full_width(text) if language == "zh" and any("\u4e00" <= c <= "\u9fff" for c in text) else text


def fill_slots(template: str, subject: str, obj: str, language: str) -> str:
    """Put subject and object into a template; "a owl" becomes "an owl". `{p}` is the part in counts."""
    part = ""
    if "/" in subject:
        subject, part = subject.split("/")
    with_article = article(subject) if language == "en" else subject
    if language == "en" and subject == "hour":
        with_article = "an hour"
    text = template.replace("{as}", with_article).replace("{p}", part)
    if language == "en":
        for article_slot, word in (("a {s}", subject), ("a {o}", obj)):
            for form in (article_slot, upper_first(article_slot)):
                fixed = article(word) if form[0] == "a" else upper_first(article(word))
                if template.startswith(form):
                    text = text.replace(form, fixed, 1)
                text = text.replace(" " + form, " " + fixed)
    return text.replace("{s}", subject).replace("{o}", obj)
